"""The licences that model cards use, as data: names, what they demand of a merge, and one sentence each.

Licences are compared by what they demand of whoever passes a merged model on: `keep` counts up from nothing
(0) through the notice (1) to the notice and what was changed (2); `terms` are further demands. One demands at
least as much as another where neither is less. It is a table for people to go by, and no legal advice.

    share:X        what is made of it goes under these terms alone; weak:X asks that of its own parts only
    network        those who use it over a network get it too
    noncommercial  nobody may earn with it
    no-derivatives nothing made of it may be passed on: no merge
    anything else  terms that are a licence's own
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NO_DERIVATIVES = "no-derivatives"


@dataclass(frozen=True, slots=True)
class Licence:
    """One row: SPDX name (a LicenseRef where SPDX has none), the hub's name ("" for none), demands.

    `duty` is what somebody who passes a merge on must do that a copy of the notice does not cover.
    """

    name: str
    hub: str
    keep: int
    terms: frozenset[str]
    sentence: str
    duty: str = ""

    @property
    def known(self) -> bool:
        """Whether the table has it."""
        return self.keep >= 0

    @property
    def forbids_merging(self) -> bool:
        """Whether nothing that is made of it may be passed on."""
        return NO_DERIVATIVES in self.terms

    def covers(self, other: Licence) -> bool:
        """Whether it demands at least what the other does."""
        return self.keep >= other.keep and self.terms >= other.terms


def _row(name: str, hub: str, keep: int, terms: str, sentence: str, duty: str = "") -> Licence:
    return Licence(name, hub, keep, frozenset(terms.split()), sentence, duty)


_GPL3 = "weak:GPL share:GPL share:GPL-3.0"
_GPL3_ONLY = f"{_GPL3} weak:GPL-3.0-only share:GPL-3.0-only"
_LLAMA = 'Show "Built with {0}", and begin the name of the merged model with "{0}".'

TABLE = (
    # -- nothing is asked ------------------------------------------------------------------------------
    _row("0BSD", "", 0, "", "Do what you like."),
    _row("CC0-1.0", "cc0-1.0", 0, "", "Dedicated to the public domain."),
    _row("MIT-0", "", 0, "", "Do what you like."),
    _row("PDDL-1.0", "pddl", 0, "", "Data dedicated to the public domain."),
    _row("Unlicense", "unlicense", 0, "", "Dedicated to the public domain."),
    _row("WTFPL", "wtfpl", 0, "", "Do what you like."),
    # -- the notice ------------------------------------------------------------------------------------
    _row("BSD-2-Clause", "bsd-2-clause", 1, "", "Keep the notice."),
    _row("BSD-3-Clause", "bsd-3-clause", 1, "", "Keep the notice; do not advertise with its authors."),
    _row("BSD-3-Clause-Clear", "bsd-3-clause-clear", 1, "", "Keep the notice; no patents are licensed."),
    _row("BSL-1.0", "bsl-1.0", 1, "", "Keep the notice with the sources."),
    _row("CDLA-Permissive-2.0", "cdla-permissive-2.0", 1, "", "Pass the licence on with the data."),
    _row("ISC", "isc", 1, "", "Keep the notice."),
    _row("MIT", "mit", 1, "", "Keep the notice."),
    _row("NCSA", "ncsa", 1, "", "Keep the notice; do not advertise with its authors."),
    _row("ODC-By-1.0", "odc-by", 1, "", "Name the source of the data."),
    _row("PostgreSQL", "postgresql", 1, "", "Keep the notice."),
    _row("Zlib", "zlib", 1, "", "Keep the notice, and do not claim to have written the original."),
    _row("etalab-2.0", "etalab-2.0", 1, "", "Name the source and the day of its last change."),
    # -- the notice and what was changed ---------------------------------------------------------------
    _row("AFL-3.0", "afl-3.0", 2, "", "Keep the notices, say what you changed; patents are licensed."),
    _row("Apache-2.0", "apache-2.0", 2, "", "Keep the notices, say what you changed; patents are licensed."),
    _row("Artistic-2.0", "artistic-2.0", 2, "", "Keep the notice, say what you changed."),
    _row("CC-BY-2.0", "cc-by-2.0", 2, "", "Name the authors, say what you changed."),
    _row("CC-BY-2.5", "cc-by-2.5", 2, "", "Name the authors, say what you changed."),
    _row("CC-BY-3.0", "cc-by-3.0", 2, "", "Name the authors, say what you changed."),
    _row("CC-BY-4.0", "cc-by-4.0", 2, "", "Name the authors, say what you changed."),
    _row("CDLA-Permissive-1.0", "cdla-permissive-1.0", 2, "", "Keep the notices, say what you changed."),
    _row("ECL-2.0", "ecl-2.0", 2, "", "Keep the notices, say what you changed; some patents are licensed."),
    # -- its own parts stay under it -------------------------------------------------------------------
    _row("EPL-1.0", "epl-1.0", 2, "weak:EPL", "What is its own stays under it."),
    _row("EPL-2.0", "epl-2.0", 2, "weak:EPL weak:EPL-2.0", "What is its own stays under it."),
    _row("LGPL-2.1-only", "lgpl-2.1", 2, "weak:GPL weak:LGPL-2.1", "What is its own stays under it."),
    _row("LGPL-3.0-only", "lgpl-3.0", 2, "weak:GPL weak:GPL-3.0-only", "What is its own stays under it."),
    _row("LGPL-3.0-or-later", "", 2, "weak:GPL", "What is its own stays under it or a later version."),
    _row("MPL-2.0", "mpl-2.0", 2, "weak:MPL", "What is its own stays under it."),
    _row("MS-PL", "ms-pl", 2, "weak:MS-PL", "What is its own stays under it."),
    # -- everything made of it goes under it -----------------------------------------------------------
    _row("CC-BY-SA-3.0", "cc-by-sa-3.0", 2, "share:CC-BY-SA", "What is made of it goes under it."),
    _row(
        "CC-BY-SA-4.0",
        "cc-by-sa-4.0",
        2,
        "share:CC-BY-SA share:CC-BY-SA-4.0",
        "What is made of it goes under it.",
    ),
    _row("CDLA-Sharing-1.0", "cdla-sharing-1.0", 2, "share:CDLA", "What is made of it goes under it."),
    _row("EUPL-1.1", "eupl-1.1", 2, "share:EUPL", "What is made of it goes under it."),
    _row("EUPL-1.2", "eupl-1.2", 2, "share:EUPL share:EUPL-1.2", "What is made of it goes under it."),
    _row(
        "GPL-2.0-only", "gpl-2.0", 2, "weak:GPL share:GPL share:GPL-2.0", "What is made of it goes under it."
    ),
    _row(
        "GPL-2.0-or-later",
        "",
        2,
        "weak:GPL share:GPL",
        "What is made of it goes under it or a later version.",
    ),
    _row("GPL-3.0-only", "gpl-3.0", 2, _GPL3_ONLY, "What is made of it goes under it."),
    _row("GPL-3.0-or-later", "", 2, _GPL3, "What is made of it goes under it or a later version."),
    _row("ODbL-1.0", "odbl", 2, "share:ODbL", "Databases made of it go under it."),
    _row("OFL-1.1", "ofl-1.1", 2, "share:OFL", "What is made of it goes under it, by another name."),
    _row(
        *("AGPL-3.0-only", "agpl-3.0", 2, f"{_GPL3_ONLY} network"),
        "What is made of it goes under it, also for those who only use it over a network.",
    ),
    _row(
        *("AGPL-3.0-or-later", "", 2, f"{_GPL3} network"),
        "What is made of it goes under it or a later version, also for those who use it over a network.",
    ),
    _row(
        "OSL-3.0", "osl-3.0", 2, "share:OSL network", "What is made of it goes under it, over a network too."
    ),
    # -- nobody may earn with it -----------------------------------------------------------------------
    _row("CC-BY-NC-2.0", "cc-by-nc-2.0", 2, "noncommercial", "Name the authors; not for business."),
    _row("CC-BY-NC-3.0", "cc-by-nc-3.0", 2, "noncommercial", "Name the authors; not for business."),
    _row("CC-BY-NC-4.0", "cc-by-nc-4.0", 2, "noncommercial", "Name the authors; not for business."),
    _row(
        *("CC-BY-NC-SA-3.0", "cc-by-nc-sa-3.0", 2, "noncommercial share:CC-BY-NC-SA"),
        "What is made of it goes under it; not for business.",
    ),
    _row(
        *("CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", 2, "noncommercial share:CC-BY-NC-SA share:CC-BY-NC-SA-4.0"),
        "What is made of it goes under it; not for business.",
    ),
    _row("LicenseRef-mnpl", "", 2, "noncommercial mnpl", "Mistral's non-production terms: for tests only."),
    _row("LicenseRef-mrl", "", 2, "noncommercial mrl", "Mistral's research terms: not for business."),
    _row("LicenseRef-qwen-research", "", 2, "noncommercial qwen", "Qwen's research terms: not for business."),
    # -- terms of their own ----------------------------------------------------------------------------
    _row(
        "LicenseRef-openrail", "openrail", 2, "openrail", "Some uses are forbidden, also to those after you."
    ),
    _row(
        *("LicenseRef-bigscience-bloom-rail-1.0", "bigscience-bloom-rail-1.0", 2, "openrail bloom-rail"),
        "Some uses are forbidden, also to those after you.",
    ),
    _row(
        *("LicenseRef-bigscience-openrail-m", "bigscience-openrail-m", 2, "openrail bigscience"),
        "Some uses are forbidden, also to those after you.",
    ),
    _row(
        *("LicenseRef-bigcode-openrail-m", "bigcode-openrail-m", 2, "openrail bigcode"),
        "Some uses are forbidden, also to those after you.",
    ),
    _row(
        *("LicenseRef-creativeml-openrail-m", "creativeml-openrail-m", 2, "openrail creativeml"),
        "Some uses are forbidden, also to those after you.",
    ),
    _row(
        *("LicenseRef-gemma", "gemma", 2, "gemma", "Google's Gemma terms: some uses are forbidden."),
        "Pass Google's terms of use on with the merged model, and say that it was changed.",
    ),
    _row(
        *("LicenseRef-llama2", "llama2", 2, "llama2", "Meta's Llama 2 terms: not for the very large."),
        "Pass Meta's licence on with the merged model, and train no other models with its output.",
    ),
    _row(
        *("LicenseRef-llama3", "llama3", 2, "llama3", "Meta's Llama 3 terms: not for the very large."),
        _LLAMA.format("Llama 3").replace("Built with ", "Built with Meta "),
    ),
    *(
        _row(
            *(f"LicenseRef-{name}", name, 2, name, "Meta's Llama terms: not for the very large."),
            _LLAMA.format("Llama"),
        )
        for name in ("llama3.1", "llama3.2", "llama3.3", "llama4")
    ),
    # -- no merge --------------------------------------------------------------------------------------
    *(
        _row(
            *(f"CC-BY-{kind}-{version}", hub, 2, terms),
            "Nothing that is made of it may be passed on.",
        )
        for kind, version, hub, terms in (
            ("ND", "3.0", "", NO_DERIVATIVES),
            ("ND", "4.0", "cc-by-nd-4.0", NO_DERIVATIVES),
            ("NC-ND", "3.0", "cc-by-nc-nd-3.0", f"noncommercial {NO_DERIVATIVES}"),
            ("NC-ND", "4.0", "cc-by-nc-nd-4.0", f"noncommercial {NO_DERIVATIVES}"),
        )
    ),
)

_BY_NAME = {licence.name: licence for licence in TABLE}
_NO_MERGE = re.compile(r"(?i)(^|[^a-z])cc[ _-]*by([ _-]*nc)?[ _-]*nd($|[^a-z])|no[ _-]*deriv")


def licence(name: str) -> Licence:
    """The row of a name; one that the table lacks may demand anything, so it covers no other."""
    known = _BY_NAME.get(name)
    if known is not None:
        return known
    terms = {name} | ({NO_DERIVATIVES} if _NO_MERGE.search(name) else set())
    return Licence(name, "", -1, frozenset(terms), "Not in the table: read it before you pass a merge on.")
