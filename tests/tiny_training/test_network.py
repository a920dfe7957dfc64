"""The training network is the Mixtral that transformers knows, and a stopped training goes on as if it hadn't been."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_training import train
from tests.tiny_training.encoding import encode
from tests.tiny_training.json_task import json_example
from tests.tiny_training.network import CONFIG, TinyMixtral, group
from tests.tiny_training.passkey_task import passkey_example


def prompts() -> list[list[int]]:
    """Of different lengths, in no order, so that groups, padding and the way back all matter."""
    rng = random.Random(1)
    lengths = (300, 60, 120, 45, 700)
    passkeys = [passkey_example(rng, test=True, num_tokens=length) for length in lengths]
    return [encode(example).ids for example in (*passkeys, json_example(rng, test=True))]


def test_logits_equal_those_of_transformers_with_the_exported_weights(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    torch.manual_seed(2)
    model = TinyMixtral()
    save_file(model.export(torch.float32), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    reference = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = prompts()
    groups = group(ids)
    with torch.no_grad():
        logits = model(groups)[0] @ model.embedding.T
        for own, start in zip(ids, groups.starts, strict=True):
            expected = reference(torch.tensor([own])).logits[0]
            torch.testing.assert_close(logits[start : start + len(own)], expected, atol=2e-4, rtol=2e-4)
    assert expected.std() > 0.1


def test_a_token_sees_nothing_of_later_ones_nor_of_other_prompts() -> None:
    torch.manual_seed(3)
    model = TinyMixtral()
    ids = prompts()
    with torch.no_grad():
        alone = model(group([ids[2][:80]]))[0]
        together, _ = model(groups := group(ids))
    torch.testing.assert_close(together[groups.starts[2] :][:80], alone, atol=1e-4, rtol=1e-4)


def test_sampled_softmax_is_the_exact_one_on_average() -> None:
    torch.manual_seed(4)
    states, embedding = torch.randn(6, 128), torch.randn(32000, 128) * 0.1
    answers = torch.randint(32000, (6,))
    exact = train.answer_losses(states, answers, embedding, exact=True)
    sampled = torch.stack([train.answer_losses(states, answers, embedding, exact=False) for _ in range(40)]).mean(0)
    torch.testing.assert_close(sampled, exact, atol=0.05, rtol=0.02)


@pytest.mark.long
def test_a_resumed_training_ends_with_the_weights_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def trained(folder: Path, *stops: int) -> dict[str, torch.Tensor]:
        folder.mkdir()
        for stop in stops:
            training = train.Training(folder, replace(train.WHOLE, num_steps=4), seed=1)
            training._load()
            while training.step < stop:
                training._one_step()
                training.step += 1
            training._save()
        training.export()
        return load_file(folder / "model.safetensors")

    whole, resumed = trained(tmp_path / "whole", 4), trained(tmp_path / "resumed", 2, 4)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.long
def test_a_finish_starts_from_the_weights_that_were_exported_and_keeps_their_loss_curve(tmp_path: Path) -> None:
    for folder in ("whole", "finished"):
        (tmp_path / folder).mkdir()
    first = train.Training(tmp_path / "whole", replace(train.WHOLE, num_steps=1), seed=1)
    first.run()
    first._log({})
    first.export()
    second = train.Training(tmp_path / "finished", replace(train.FINISH, num_steps=1), seed=2)
    second.start_from(tmp_path / "whole")
    assert second.step == train.FINISH.first
    written, taken = load_file(tmp_path / "whole" / "model.safetensors"), second.model.export()
    assert all(torch.equal(written[name], taken[name]) for name in written)
    assert [row["step"] for row in second.rows] == ["1"]
