"""Texts of different lengths: which models take them filled up, and to which lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert import UnsupportedModelError
from dcconvert.models.pipelines.drop_in import DropIn
from dcconvert.models.pipelines.texts import Text, length_is_free, next_length, texts_of

TEXT = Text("encoder_hidden_states", "encoder_attention_mask")


class Attends(nn.Module):
    """Image tokens attend to a text; `masked`: only where the mask says so. `counts`: its length matters as well."""

    def __init__(self, masked: bool = True, counts: bool = False) -> None:
        super().__init__()
        self.masked, self.counts = masked, counts

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> tuple[Tensor]:
        mask = None
        if encoder_attention_mask is not None and self.masked:
            mask = encoder_attention_mask.bool()[:, None]
        found = F.scaled_dot_product_attention(hidden_states, encoder_hidden_states, encoder_hidden_states, mask)
        return (found * encoder_hidden_states.shape[1] if self.counts else found,)


def call(length: int = 7, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    given = {"hidden_states": torch.randn(2, 9, 4, generator=generator)}
    return {**given, "encoder_hidden_states": torch.randn(2, length, 4, generator=generator), **more}


def test_lengths():
    assert [next_length(n) for n in (1, 32, 33, 48, 49, 65, 100, 512, 513)] == [32, 32, 48, 48, 64, 96, 128, 512, 768]


def test_texts_are_those_that_the_model_takes_a_mask_for():
    assert list(texts_of(Attends(), call())) == [TEXT]
    assert list(texts_of(Attends(), call(encoder_attention_mask=torch.ones(2, 7)))) == [TEXT]
    assert list(texts_of(Attends(), call(encoder_attention_mask=torch.ones(2, 1, 7)))) == []
    assert list(texts_of(nn.Linear(2, 2), {"input": torch.ones(1, 2, 3)})) == []


def test_a_filled_text():
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    found = TEXT.filled(call(encoder_attention_mask=mask))
    assert found["encoder_hidden_states"].shape == (2, 32, 4)
    assert found["encoder_hidden_states"][:, 7:].abs().max() == 0
    assert found["encoder_attention_mask"].sum(1).tolist() == [7, 5]
    assert TEXT.filled(call())["encoder_attention_mask"].sum(1).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("module", "free"), [(Attends(), True), (Attends(False), False), (Attends(counts=True), False)]
)
def test_what_is_masked_must_not_matter(module, free):
    assert length_is_free(module, call(), TEXT) == free


def test_a_length_of_the_ladder_proves_nothing_by_itself():
    """A text of such a length is filled up further for the proof."""
    given = {**call(), "encoder_hidden_states": torch.randn(2, 64, 4)}
    assert TEXT.filled(given)["encoder_hidden_states"].shape == (2, 64, 4)
    assert length_is_free(Attends(), given, TEXT)
    assert not length_is_free(Attends(False), given, TEXT)


def converted(module: nn.Module, lengths: list[int], refuses_masks: bool = False) -> list[tuple[int, ...]]:
    """The shapes of texts that calls with these lengths are converted for."""
    found: list[tuple[int, ...]] = []

    def convert(_: Any, example_inputs: dict[str, Any], **__: Any) -> Any:
        if refuses_masks and TEXT.mask in example_inputs:
            raise UnsupportedModelError("no masks")
        found.append(tuple(example_inputs[TEXT.name].shape))
        return object()

    drop = DropIn(module, convert, steps=4)
    for length in lengths:
        drop.model_and_call(call(length))
    return found


def test_prompts_of_many_lengths_need_few_conversions():
    assert converted(Attends(), [7, 7]) == [(2, 7, 4)]  # of one length: as it is
    assert converted(Attends(), [7, 9, 7, 12, 31, 40]) == [(2, 7, 4), (2, 32, 4), (2, 48, 4)]


def test_models_without_masks_are_converted_for_each_length():
    for module, refuses in ((Attends(False), False), (Attends(), True)):
        assert converted(module, [7, 9, 7], refuses) == [(2, 7, 4), (2, 9, 4)]
