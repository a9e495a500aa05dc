"""Ranks that train together: their shares are whole heaps, and their result is that of one process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_project import write_project

from satlib.attacks import random_start
from satlib.parallel import Ranks, current_ranks
from satlib.study.ledger import Ledger
from satlib.study.records import CHECKPOINT, Record

TRAIN = """
import gc
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from conftest import tiny
from satlib.errors import SatlibError
from satlib.parallel import Stopped
from satlib.training import Training, train

rank, ranks, sharedness, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if ranks > 1:
    dist.init_process_group("gloo", init_method="file://" + out + ".store", rank=rank, world_size=ranks)

def fresh():
    torch.manual_seed(rank)  # only rank 0's weights count
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(72, 4)
    )
    model[0].weight.data /= 128
    return model.double().to(memory_format=torch.channels_last)

data = (tiny.__wrapped__() if hasattr(tiny, "__wrapped__") else tiny._get_wrapped_function()()).train

class Doubled:  # the images as float64, so that sums in another order give the same signs
    def __len__(self):
        return len(data)
    def batches(self, *args, **options):
        return ((x.double(), y) for x, y in data.batches(*args, **options))

settings = Training(
    epochs=2, batch_size=30, epoch_images=97, learning_rate=0.05, milestones=(1,), seed=3,
    **({{"sigma": 0.6, "eps": 20.0, "sharedness": sharedness, "steps": 3}} if sharedness else {{}}),
)
model = fresh()
history = train(model, Doubled(), settings, history=None if rank == 0 else [{{"epoch": 1, "loss": 0.0}}])

kept = []  # stopped after an epoch, and gone on from a copy of everything, as from a checkpoint
def stop(state, history):
    kept.append(({{k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}}, list(history)))
    raise RuntimeError("enough")
try:
    train(fresh(), Doubled(), settings, after_epoch=stop)
except (RuntimeError, Stopped) as error:
    assert rank > 0 or str(error) == "enough"
else:
    raise AssertionError("not stopped")
state, past = kept[0] if rank == 0 else (None, None)
resumed = fresh()
assert train(resumed, Doubled(), settings, state=state, history=past) == history
for name, value in model.state_dict().items():
    assert torch.equal(resumed.state_dict()[name], value), name

if ranks > 1 and rank == 1:
    try:
        train(model, Doubled(), settings, adversary=object())
    except SatlibError as error:
        assert "object trains on one rank, not 2" in str(error)
    else:
        raise AssertionError("an adversary was accepted")
losses = torch.tensor([each["loss"] for each in history])
if ranks > 1:
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
save_file({{"losses": losses}} | {{k: v.contiguous() for k, v in model.state_dict().items()}}, f"{{out}}.{{rank}}")
"""


def run(tmp_path: Path, ranks: int, sharedness: int) -> list[dict[str, torch.Tensor]]:
    out = tmp_path / f"of{ranks}"
    code = TRAIN.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"SATLIB_PRECISION": "float32", "OMP_NUM_THREADS": "1"}
    arguments = [
        [sys.executable, "-c", code, str(rank), str(ranks), str(sharedness), str(out)] for rank in range(ranks)
    ]
    processes = [subprocess.Popen(each, env=environment) for each in arguments]
    assert [process.wait(timeout=300) for process in processes] == [0] * ranks
    return [load_file(f"{out}.{rank}") for rank in range(ranks)]


@pytest.mark.parametrize("sharedness", [0, 8])
def test_two_ranks_train_as_one_process_on_the_union_of_their_images(tmp_path, sharedness):
    """Mini-batches of 30 are four heaps of 8, 8, 8 and 6 images; the last is one of 7, and leaves rank 1 without any.

    A training that is stopped and goes on ends alike."""
    (alone,), together = run(tmp_path, 1, sharedness), run(tmp_path, 2, sharedness)
    assert alone["losses"].shape == (2,)
    for found in together:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@given(images=st.integers(1, 70), sharedness=st.integers(1, 70), count=st.integers(1, 9))
def test_shares_are_whole_heaps_of_which_each_is_taken_once(images, sharedness, count):
    shares = [Ranks(rank, count).share(images, sharedness) for rank in range(count)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(images))
    assert all(share.start % sharedness == 0 for share in shares if share.start < images)
    heaps = [-(-(share.stop - share.start) // sharedness) for share in shares]
    assert max(heaps) - min(heaps) <= 1 and heaps[0] > 0


@given(images=st.integers(1, 40), sharedness=st.integers(1, 40), count=st.integers(1, 5))
def test_ranks_start_from_what_one_process_draws(images, sharedness, count):
    """And go on from there: the next mini-batch's draws are those of one process, too."""

    def start(ranks):
        generator, own = torch.Generator().manual_seed(1), ranks.share(images, sharedness)
        with ranks.drawing(images, sharedness, 1 * 2 * 2, generator):
            drawn = random_start((-(-(own.stop - own.start) // sharedness), 1, 2, 2), 8.0, generator)
        return drawn, torch.rand(3, generator=generator)

    alone, after = start(Ranks())
    parts, afterwards = zip(*(start(Ranks(rank, count)) for rank in range(count)), strict=True)
    assert torch.equal(torch.cat(parts), alone)
    assert all(torch.equal(each, after) for each in afterwards)
    whole = random_start((-(-images // sharedness), 1, 2, 2), 8.0, torch.Generator().manual_seed(1))
    assert torch.equal(alone, whole)


def test_a_process_on_its_own_is_the_only_rank():
    assert current_ranks() == Ranks(0, 1)
    assert Ranks().share(7, 3) == slice(0, 7) and Ranks().broadcast_object([1]) == [1]


SMALL = {
    "depth": 8,
    "width": 2,
    "erm_epochs": 1,
    "erm_batch_size": 64,
    "erm_schedule": "one-cycle",
    "finetune_epochs": 2,
    "finetune_epoch_images": 128,
    "dataset": "shapes32",
    "points": [[8, 8.0, 0.5]],
    "baselines": [["fictitious play", 8.0]],
    "strongest_seeds": 0,
}


def two_ranks(home: Path, *, wait: bool = True) -> subprocess.Popen:
    """`train` on two ranks, in a project of its own with the profile of SMALL."""
    if not home.exists():
        write_project(home, {}, {"6.1": SMALL, "checks": {"audited": []}})
    environment = os.environ | {"SATLIB_HOME": str(home), "SATLIB_PRECISION": "float32", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "satlib", "train", "--only", "=8, eps=8", "--device", "cpu"]
    with (home / "out").open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    if wait:
        assert process.wait(300) == 0, (home / "out").read_text()
    return process


def trainings(home: Path) -> list[Record]:
    return sorted(Ledger(home / "data").records(), key=lambda record: record.labels["title"])


def test_torchrun_trains_a_profile_s_models_and_goes_on_after_a_rank_was_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    two_ranks(whole)
    assert (whole / "out").read_text().count("2 trainings of the profile 'quick' have a record") == 1
    records = trainings(whole)
    assert [record.labels["title"] for record in records] == ["ERM", "s=8, eps=8, sigma=0.5"]
    assert [len(record.metrics["history"]) for record in records] == [1, 2]
    two_ranks(whole)
    again = (whole / "out").read_text()
    assert "2 trainings" in again and "[run]" not in again  # all of it is known
    assert [r.created for r in trainings(whole)] == [r.created for r in records]

    process = two_ranks(killed, wait=False)
    deadline = time.monotonic() + 120
    while not any((killed / "data").rglob(CHECKPOINT)) and time.monotonic() < deadline:
        time.sleep(0.02)
    psutil.Process(process.pid).children()[-1].kill()
    assert process.wait(120) != 0
    assert len(trainings(killed)) < 2, "it was killed too late"
    two_ranks(killed)
    for once, twice in zip(records, trainings(killed), strict=True):
        assert once.id == twice.id and once.metrics == twice.metrics
        found = twice.tensors("weights")
        assert all(torch.equal(value, found[name]) for name, value in once.tensors("weights").items())
