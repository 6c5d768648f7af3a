"""Saves that are killed at any moment: afterwards the old adapter or the new one loads."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch

import peftkern
from peftkern.checkpoint.state_dicts import load_peft_weights
from peftkern.files.atomic import COMMITTED, _put_in_place, read_whole, replaced_together
from tests.tiny import fill, make

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SAFE, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def adapted(r, seed):
    config = peftkern.LoraConfig(r=r, task_type="CAUSAL_LM", target_modules="all-linear")
    model = peftkern.get_peft_model(make("llama"), config)
    fill(model, seed=seed)
    return model


def loads_as(folder):
    """The rank of the adapter in ``folder``, and its weights."""
    model = peftkern.PeftModel.from_pretrained(make("llama"), folder)
    return model.peft_config["default"].r, peftkern.get_peft_model_state_dict(model)


def killed_while_saving(models, folder, draw):
    """Kill a child process that saves ``models`` again and again.

    It reports each save and is killed within the next few ones, however fast the machine is.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            while True:
                for model in models:
                    model.save_pretrained(folder)
                    os.write(writing, b".")
        finally:
            os._exit(1)
    os.close(writing)
    start = time.perf_counter()
    os.read(reading, 1)
    time.sleep(draw.uniform(0.0, 3.0) * (time.perf_counter() - start))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    assert os.WIFSIGNALED(status), "the child failed before it was killed"


def _kill_at_random(folder, moments):
    """Two adapters of different ranks, so that weights and configuration fit only together."""
    models = {4: adapted(4, 1), 6: adapted(6, 2)}
    wanted = {r: peftkern.get_peft_model_state_dict(m) for r, m in models.items()}
    models[4].save_pretrained(folder)
    draw, seen = random.Random(0), set()
    for _ in range(moments):
        order = list(models.values())
        draw.shuffle(order)
        killed_while_saving(order, folder, draw)
        r, weights = loads_as(folder)
        assert weights.keys() == wanted[r].keys()
        assert all(torch.equal(weights[k], v) for k, v in wanted[r].items())
        seen.add(r)
    assert seen == {4, 6}  # else nothing was ever replaced
    models[6].save_pretrained(folder)
    assert sorted(p for p in os.listdir(folder) if not p.startswith(".saving-")) == sorted(
        ["README.md", CONFIG, SAFE]
    )


@pytest.mark.long
def test_killed_at_random_moments(tmp_path):
    _kill_at_random(tmp_path, 25)


@pytest.mark.slow
def test_killed_at_two_hundred_random_moments(tmp_path):
    _kill_at_random(tmp_path, 200)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("point", range(8))
def test_stopped_between_any_two_steps(point, safe, tmp_path, monkeypatch):
    """Each rename and each removal in turn is the first that does not happen any more."""
    old, new = adapted(4, 1), adapted(6, 2)
    old.save_pretrained(tmp_path, safe_serialization=not safe)
    done = []

    def stopping(real):
        def step(*args, **kwargs):
            if len(done) >= point:
                raise Killed
            done.append(args)
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, stopping(getattr(os, name)))
        patch.setattr("shutil.rmtree", lambda *a, **k: None)  # a killed process tidies nothing up
        try:
            new.save_pretrained(tmp_path, safe_serialization=safe)
        except Killed:
            pass
    r, weights = loads_as(tmp_path)
    want = peftkern.get_peft_model_state_dict({4: old, 6: new}[r])
    assert all(torch.equal(weights[k], v) for k, v in want.items())
    assert r == (4 if point <= 2 else 6)  # two temporary files are renamed, then all is decided
    _put_in_place(os.fspath(tmp_path))  # as far as the next save gets, when it is killed as well
    assert loads_as(tmp_path)[0] == r
    new.save_pretrained(tmp_path, safe_serialization=safe)
    kept, gone = (SAFE, PICKLE) if safe else (PICKLE, SAFE)
    assert (tmp_path / kept).exists() and not (tmp_path / gone).exists()
    assert not (tmp_path / COMMITTED).exists() and loads_as(tmp_path)[0] == 6


def test_the_pickle_is_pefts_and_holds_tensors_alone(tmp_path):
    import peft

    model = adapted(4, 1)
    model.save_pretrained(tmp_path, safe_serialization=False)
    weights = torch.load(tmp_path / PICKLE, weights_only=True)
    for read in (load_peft_weights(tmp_path, "cpu"), peft.load_peft_weights(tmp_path, "cpu")):
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[k], v) for k, v in weights.items())


def test_what_killed_saves_left_behind_goes_after_an_hour(tmp_path):
    for name, age in (("old", 3700.0), ("new", 60.0)):
        (tmp_path / f".saving-{name}").mkdir()
        (tmp_path / f".saving-{name}" / "half").write_text("half")
        then = time.time() - age
        os.utime(tmp_path / f".saving-{name}", (then, then))
    with replaced_together(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".saving-new"]


def test_threads_that_save_to_one_folder(tmp_path):
    """The files are those of one of them, and no thread sees another's passing settings."""
    models = [adapted(4, 1), adapted(6, 2)]
    errors = []

    def save(model):
        try:
            for _ in range(10):
                model.save_pretrained(tmp_path)
        except Exception as exc:
            errors.append(exc)

    before = os.umask(0o027)
    try:
        threads = [threading.Thread(target=save, args=(m,)) for m in models * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        assert os.umask(before) == 0o027
    assert not errors
    assert loads_as(tmp_path)[0] in (4, 6)
    assert not any(m.peft_config["default"].inference_mode for m in models)
    assert all((tmp_path / n).stat().st_mode & 0o777 == 0o640 for n in (SAFE, CONFIG))


@pytest.mark.parametrize("notices", [True, False])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(notices, tmp_path):
    file, news = tmp_path / "file", [b"new", b"newer"]
    file.write_bytes(b"old")

    def read(path):
        seen = file.read_bytes()
        if news:
            (tmp_path / "next").write_bytes(news.pop(0))
            os.replace(tmp_path / "next", file)
            if notices:
                raise ValueError("half of it")
        return seen

    assert read_whole(lambda: str(file), read) == b"newer"
    assert read_whole(lambda: None, read) is None
    with pytest.raises(ValueError, match="damaged"):  # and not tried again for nothing
        read_whole(lambda: str(file), lambda path: news.append(b"") or int("damaged"))
    assert len(news) == 1
    with pytest.raises(FileNotFoundError):
        read_whole(lambda: str(tmp_path / "none"), lambda path: open(path))
