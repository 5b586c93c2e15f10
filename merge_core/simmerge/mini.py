"""The Mini: at most 1 KiB of a fingerprint, to rank thousands of experts before any fingerprint is fetched.

    magic 8 bytes · fingerprint, model id, shapes, questions 32 each · l2, largest float64
    sketch float32[WIDTH] · behaviour float16[WIDTH], all little-endian, 920 bytes

The sketch is that of all of the weights, folded. The behaviour is a sketch of the vector of the square roots
of all listed probabilities, so that the product of two is about the mean Bhattacharyya coefficient of the
models' predictions. Questions of zeros: the model has no behaviour, and that array is zeros too.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest, ModelId, canonical, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.functional.behaviour import Behaviour
from merge_core.simmerge.structural import sketch
from merge_core.simmerge.structural.structure import Group, Structure

MAX_MINI = 1 << 10
WIDTH = 128
"""Buckets of the folded sketch, and of the projected behaviour."""

_MAGIC = b"weftmin2"
_FORMAT = struct.Struct(f"<8s32s32s32s32sdd{4 * WIDTH}s{2 * WIDTH}s")
_NOTHING = bytes(32)
_UNIT = 2.0**16
"""Square roots of probabilities are rounded to multiples of 1/_UNIT: so coarse that exp may err."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mini:
    """What ranks: `sketch` float32[WIDTH] of all weights, `behaviour` float16[WIDTH] of length about 1."""

    fingerprint: Digest
    """Of the fingerprint's bytes, without a signature."""
    model_id: ModelId
    shapes: Digest
    """Of the shapes of all groups: sketches of equal shapes can be compared."""
    questions: Digest | None
    """`Behaviour.key`: behaviours of equal questions can be compared; None without a behaviour."""
    l2: float
    largest: float
    sketch: npt.NDArray[np.float32]
    behaviour: npt.NDArray[np.float16]

    @classmethod
    def of(cls, fingerprint: Fingerprint) -> Mini:
        """The one mini of a fingerprint, the same bits everywhere."""
        structure, behaviour = fingerprint.structure, fingerprint.behaviour
        shapes = [[group.key.third, group.key.role, group.shapes] for group in structure.groups]
        return cls(
            fingerprint=fingerprint.digest,
            model_id=fingerprint.model_id,
            shapes=sha256(canonical(shapes)),
            questions=behaviour.key if behaviour else None,
            l2=math.sqrt(math.fsum(group.l2 * group.l2 for group in structure.groups)),
            largest=max(group.largest for group in structure.groups),
            sketch=_folded(structure),
            behaviour=_projected(behaviour) if behaviour else np.zeros(WIDTH, np.float16),
        )

    @cached_property
    def digest(self) -> Digest:
        """Of its bytes: what an advert calls `sketch`."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The 920 bytes."""
        digests = (self.fingerprint, self.model_id, self.shapes, self.questions)
        return _FORMAT.pack(
            _MAGIC,
            *(_NOTHING if digest is None else bytes.fromhex(digest.hex) for digest in digests),
            self.l2,
            self.largest,
            self.sketch.astype("<f4").tobytes(),
            self.behaviour.astype("<f2").tobytes(),
        )

    @classmethod
    def parse(cls, data: bytes) -> Mini:
        """Read a mini from anybody; raises CorruptCheckpoint on whatever is not exact."""
        try:
            magic, *digests, l2, largest, weights, behaviour = _FORMAT.unpack(data)
            fingerprint, model_id, shapes = map(_digest, digests[:3])
            found = cls(
                fingerprint=fingerprint,
                model_id=ModelId(model_id),
                shapes=shapes,
                questions=None if digests[3] == _NOTHING else _digest(digests[3]),
                l2=l2,
                largest=largest,
                sketch=np.frombuffer(weights, "<f4"),
                behaviour=np.frombuffer(behaviour, "<f2"),
            )
            why = "its first bytes" if magic != _MAGIC else _problem(found)
            if why:
                raise ValueError(why)
        except (ValueError, struct.error) as error:
            raise CorruptCheckpoint(
                f"not a sketch of a fingerprint: {error}", hint="ask another holder for it"
            ) from error
        return found


def _problem(mini: Mini) -> str | None:
    """Why this is no mini; None where it may be one."""
    if any(not math.isfinite(norm) or math.copysign(1.0, norm) < 0 for norm in (mini.l2, mini.largest)):
        return "its norms"
    if not (np.isfinite(mini.sketch).all() and np.isfinite(mini.behaviour).all()):
        return "a number that is not finite"
    if mini.questions is None and mini.behaviour.view(np.uint16).any():
        return "a behaviour without questions"
    return None


def _digest(raw: bytes) -> Digest:
    return Digest(f"sha256:{raw.hex()}")


def _folded(structure: Structure) -> npt.NDArray[np.float32]:
    """The sketches of all groups, added, and folded in halves down to WIDTH buckets."""
    total = np.zeros(sketch.WIDTH)
    for group in structure.groups:
        total += group.sketch if len(group.sketch) else _sketched(group)
    while len(total) > WIDTH:
        half = len(total) // 2
        total = total[:half] + total[half:]
    with np.errstate(over="ignore"):
        return np.clip(total, -_LARGEST, _LARGEST).astype(np.float32)


_LARGEST = float(np.finfo(np.float32).max)


def _sketched(group: Group) -> npt.NDArray[np.float32]:
    """The sketch of a group that is there whole, as if it were a tensor by the name of its shapes."""
    blocks = -(-len(group.sample) // sketch.BLOCK)
    return sketch.sketch_of(sketch.formula(group.sample, sketch.draws(group.shapes, 0, blocks)).limbs)


def _projected(behaviour: Behaviour) -> npt.NDArray[np.float16]:
    """A count sketch of √p over positions and tokens, divided by the root of the number of positions."""
    positions = np.arange(len(behaviour.ids), dtype=np.uint64)[:, None]
    mixed = _mixed((positions << np.uint64(32)) | behaviour.ids).ravel()
    roots = np.rint(np.exp(behaviour.logp.astype(np.float64) / 2) * _UNIT).ravel()
    signed = np.where(mixed >> np.uint64(63), roots, -roots)
    # Integers below 2^53: any order of adding is exact.
    total = np.bincount((mixed % np.uint64(WIDTH)).astype(np.int64), weights=signed, minlength=WIDTH)
    return (total / (_UNIT * math.sqrt(len(positions)))).astype(np.float16)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Well-mixed bits of integers (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
