"""The worker: results, events and typed errors cross; death is noticed on both sides; nothing is orphaned."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_core.checkpoint.reader import Checkpoint, Measured, measure
from merge_core.errors import CorruptCheckpoint, MergeCoreError, Unmergeable
from merge_core.simmerge.fingerprint import Fingerprint
from node.errors import LimitReached, LocalError
from node.worker import messages, process

Event = dict[str, Any]


def run(task: str, request: dict[str, Any], on_event: Callable[[Event], None] = lambda _: None) -> Event:
    return asyncio.run(asyncio.wait_for(process.run(task, request, on_event=on_event), 100))


def measured_input(directory: Path, where: Path) -> tuple[Measured, dict[str, str]]:
    with Checkpoint.open(directory) as checkpoint:
        measured = measure(checkpoint)
    where.mkdir()
    (where / "manifest.json").write_bytes(measured.manifest.to_bytes())
    (where / "leaves.bin").write_bytes(measured.leaves.to_bytes())
    paths = {"manifest": str(where / "manifest.json"), "leaves": str(where / "leaves.bin")}
    return measured, {"directory": str(directory), **paths}


def asked(described: dict[str, str], output: Path, probes: str = "") -> dict[str, Any]:
    """A request for a fingerprint, of the weights alone unless there are probes."""
    return {"input": described, "output": str(output), "probes": probes}


def long_work(tmp_path: Path) -> dict[str, Any]:
    """A request for the task `zoo` that takes far longer than any test here waits."""
    return {"directory": str(tmp_path / "zoo"), "seed": 1, "size": "demo"}


def ended(descriptor: int, seconds: float = 30) -> bool:
    """Whether the process of a pidfd ends in time."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def test_a_worker_that_is_never_asked_ends_with_the_block_that_started_it() -> None:
    async def start(fail: bool) -> int:
        async with process.started("merge") as worker:
            child = os.pidfd_open(worker.pid)
            if fail:
                raise Unmergeable("no plan")
        return child

    child = asyncio.run(start(fail=False))
    assert ended(child, seconds=0)
    os.close(child)
    with pytest.raises(Unmergeable, match="no plan"):
        asyncio.run(start(fail=True))
    assert not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


def test_a_result_and_the_events_before_it_come_back(model_dir: Path, tmp_path: Path) -> None:
    measured, described = measured_input(model_dir, tmp_path / "records")
    events: list[Event] = []
    result = run("fingerprint", asked(described, tmp_path / "fp"), events.append)
    fingerprint = Fingerprint.parse((tmp_path / "fp").read_bytes())
    assert fingerprint.model_id == measured.manifest.model_id
    size = (tmp_path / "fp").stat().st_size
    assert result == {"digest": fingerprint.digest, "size": size, "silent": ""}
    assert fingerprint.behaviour is None
    assert events[0]["kind"] == "started" and events[0]["pid"] != os.getpid()
    assert events[-1] == {
        "kind": "progress",
        "what": "sketch",
        "done": measured.manifest.size,
        "total": measured.manifest.size,
    }


def test_a_model_that_cannot_be_asked_has_the_fingerprint_of_its_weights(
    model_dir: Path, tmp_path: Path
) -> None:
    _, described = measured_input(model_dir, tmp_path / "records")
    result = run("fingerprint", asked(described, tmp_path / "fp", "zoo"))
    assert result["silent"] == "it has no tokenizer.json"
    alone = run("fingerprint", asked(described, tmp_path / "alone"))
    assert (tmp_path / "fp").read_bytes() == (tmp_path / "alone").read_bytes()
    assert alone["digest"] == result["digest"]


def test_a_flipped_bit_in_the_weights_comes_back_as_corrupt_checkpoint(
    model_dir: Path, tmp_path: Path
) -> None:
    _, described = measured_input(model_dir, tmp_path / "records")
    weights = model_dir / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1000] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CorruptCheckpoint, match="not what was published") as caught:
        run("fingerprint", asked(described, tmp_path / "fp"))
    assert "weft verify" in caught.value.hint
    assert not (tmp_path / "fp").exists()


def test_a_missing_file_comes_back_as_an_error_of_this_machine(model_dir: Path, tmp_path: Path) -> None:
    _, described = measured_input(model_dir, tmp_path / "records")
    with pytest.raises(LocalError, match="No such file"):
        run("fingerprint", asked(described, tmp_path / "nowhere" / "fp"))


def test_what_nobody_raised_on_purpose_names_the_fault_and_keeps_the_traceback() -> None:
    with pytest.raises(LocalError, match="worker for fingerprint failed: KeyError: 'probes'") as caught:
        run("fingerprint", {})
    assert "Traceback" in "".join(caught.value.__notes__)


def test_an_unknown_task_is_an_error_not_a_hang() -> None:
    with pytest.raises(LocalError, match="KeyError: 'format-the-disk'"):
        run("format-the-disk", {})


def test_a_killed_worker_is_reported_as_killed(tmp_path: Path) -> None:
    def kill(event: Event) -> None:
        os.kill(event["pid"], signal.SIGKILL)

    with pytest.raises(LocalError, match=r"SIGKILL.*memory"):
        run("zoo", long_work(tmp_path), kill)


def test_what_a_listener_raises_stops_the_work(tmp_path: Path) -> None:
    children: list[int] = []

    def refuse(event: Event) -> None:
        children.append(os.pidfd_open(event["pid"]))
        raise LimitReached("enough")

    with pytest.raises(LimitReached, match="enough"):
        run("zoo", long_work(tmp_path), refuse)
    assert ended(children[0], 0)


def test_cancelling_the_caller_kills_the_child(tmp_path: Path) -> None:
    async def story() -> int:
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def note(event: Event) -> None:
            if not started.done():
                started.set_result(os.pidfd_open(event["pid"]))

        working = asyncio.create_task(process.run("zoo", long_work(tmp_path), on_event=note))
        child = await asyncio.wait_for(started, 60)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        return child

    assert ended(asyncio.run(story()), 0)


PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-m", "node.worker", "zoo", str(os.getpid())])
"""


def test_the_child_dies_with_a_parent_that_is_killed() -> None:
    """Its pipes are those of this test and stay open, so no end of file and no broken pipe can end it."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(messages.decode(parent.stdout.readline())["event"]["pid"])
        try:
            assert not ended(child, 0)
            parent.kill()
            assert ended(child)
        finally:
            if not ended(child, 0):
                signal.pidfd_send_signal(child, signal.SIGKILL)


NOISE = """
import sys

class Noise:
    def find_spec(self, name, path=None, target=None):
        if name == "merge_core.simmerge":
            print("a library says hello")

sys.meta_path.insert(0, Noise())
"""


def test_what_a_library_prints_does_not_disturb_the_messages(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, described = measured_input(model_dir, tmp_path / "records")
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "sitecustomize.py").write_text(NOISE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "startup"), prepend=os.pathsep)
    assert run("fingerprint", asked(described, tmp_path / "fp"))["size"] > 0


def test_a_worker_whose_parent_is_already_gone_does_nothing() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "node.worker", "zoo", "1"], input=b"{}", capture_output=True, timeout=60
    )
    assert finished.returncode == 1 and finished.stdout == b""


def test_the_directory_one_stands_in_provides_no_code(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, described = measured_input(model_dir, tmp_path / "records")
    (model_dir / "numpy.py").write_text("raise SystemExit('code of a checkpoint ran')")
    monkeypatch.chdir(model_dir)
    assert run("fingerprint", asked(described, tmp_path / "fp"))["size"] > 0


def test_the_side_that_asks_imports_no_torch() -> None:
    code = "import sys, node.worker.process, node.worker.tasks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout.strip() == b"False"


def test_unmergeable_crosses_with_all_its_problems() -> None:
    error = Unmergeable("two problems", problems=("a is small", "b is large"), hint="weft check A B")
    described = messages.describe_error(error)
    assert described is not None
    back = messages.rebuild_error(described)
    assert isinstance(back, Unmergeable)
    assert (back.why, back.problems, back.hint) == (error.why, error.problems, error.hint)


@pytest.mark.parametrize("kind", sorted(messages.ERRORS))
def test_every_error_of_the_table_crosses_as_itself(kind: str) -> None:
    described = messages.describe_error(messages.ERRORS[kind]("why it is so", hint="what to run"))
    assert described is not None
    back = messages.rebuild_error(described)
    assert type(back) is messages.ERRORS[kind]
    assert (back.why, back.hint) == ("why it is so", "what to run")


def test_a_class_that_is_not_in_the_table_comes_back_as_local_error() -> None:
    assert type(messages.rebuild_error({"class": "SystemExit", "why": "no"})) is LocalError


def test_a_full_disk_is_a_limit() -> None:
    described = messages.describe_error(OSError(28, "No space left on device"))
    assert described is not None and described["class"] == "LimitReached"


def test_a_message_that_is_too_long_is_refused_by_the_sender() -> None:
    with pytest.raises(ValueError, match="at most"):
        messages.encode({"result": {"text": "x" * messages.MAX_LINE}})


def test_merge_core_errors_have_their_own_tree() -> None:
    assert issubclass(messages.ERRORS["CannotWrite"], MergeCoreError)
