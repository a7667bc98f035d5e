"""Which tokens are hidden: a function of (seed, epoch, block), with shapes that never change.

BERT's procedure (Devlin et al. 2019, section 3.1): a share of the tokens is selected for prediction; of
these 80 % become [MASK], 10 % a random token, 10 % stay.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipes.arguments import MaskingArguments
from recipes.errors import UserError
from recipes.randomness import (
    MASK_DECISION,
    MASK_REPLACEMENT,
    MASK_SELECTION,
    SPAN_LENGTH,
    random_bits,
    uniform,
)

IGNORED = -100  # the label that cross entropy skips

# Joshi et al. 2020 (SpanBERT), section 3.1: lengths in words, geometric with p = 0.2, at most 10.
SPAN_PROBABILITY, LONGEST_SPAN = 0.2, 10


@dataclass(frozen=True)
class MaskedBlocks:
    """Blocks with some tokens hidden: n blocks of L tokens, at most `capacity` of them selected."""

    input_ids: np.ndarray
    """What the model sees; int64 [n, L]."""
    masked_positions: np.ndarray
    """Where it must predict, ascending, then 0 as padding; int64 [n, capacity]."""
    labels: np.ndarray
    """The original token there, -100 at padding; int64 [n, capacity]."""

    @property
    def masked_tokens(self) -> int:
        """How many tokens are to be predicted."""
        return int((self.labels != IGNORED).sum())


class Masker:
    """Selects and replaces tokens for one tokenizer under one set of `MaskingArguments`.

    Raises:
        UserError: Whole words or spans are asked for and the tokenizer does not mark words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: MaskingArguments) -> None:
        if arguments.masking_unit != "token" and not is_word_piece(tokenizer):
            raise UserError(
                f"masking_unit {arguments.masking_unit}: needs a WordPiece tokenizer, which marks the pieces "
                "that continue a word; allowed with this one: token"
            )
        self.arguments = arguments
        self.mask_id = tokenizer.mask_token_id
        self.separator_id = tokenizer.sep_token_id
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        special = np.zeros(size, bool)
        special[tokenizer.all_special_ids] = True
        never_seen = np.ones(size, bool)
        self.continues_word = np.zeros(size, bool)
        for token, id in vocabulary.items():
            never_seen[id] = token.startswith("[unused")
            self.continues_word[id] = token.startswith("##")
        self.maskable = ~(special | never_seen)
        self.replacements = np.flatnonzero(self.maskable)

    def capacity(self, max_seq_length: int) -> int:
        """Most tokens that can be selected in a block: [CLS] and the last [SEP] never are."""
        return int(np.rint(self.arguments.mlm_probability * (max_seq_length - 2)))

    def __call__(self, blocks: np.ndarray, *key: int | np.ndarray) -> MaskedBlocks:
        """Mask `blocks` (int64 [n, L]); the parts of `key` are integers or int64 [n], one for each block.

        Raises:
            UserError: The blocks hold an id that the tokenizer does not have.
        """
        if blocks.size and blocks.max() >= len(self.maskable):
            raise UserError(
                f"token store: holds id {blocks.max()}, and its tokenizer has {len(self.maskable)} entries; "
                "damaged: delete its folder"
            )
        key = tuple(np.broadcast_to(np.asarray(part), len(blocks))[:, None] for part in key)
        maskable = self.maskable[blocks]  # [n, L]
        units = self._units(blocks, maskable, key)
        selected = self._select(units, maskable, key)
        decision_of = units if self.arguments.masking_unit == "span" else np.arange(blocks.shape[1])[None]
        input_ids = np.where(selected, self._replace(blocks, decision_of, key), blocks)
        positions, labels = self._gather(blocks, selected)
        return MaskedBlocks(input_ids, positions, labels)

    def _units(self, blocks: np.ndarray, maskable: np.ndarray, key: tuple[np.ndarray, ...]) -> np.ndarray:
        """The number of the unit that a token belongs to; tokens of a unit are selected together; [n, L]."""
        if self.arguments.masking_unit == "token":
            return np.broadcast_to(np.arange(blocks.shape[1]), blocks.shape)
        follows = np.zeros_like(maskable)
        follows[:, 1:] = self.continues_word[blocks[:, 1:]] & maskable[:, 1:] & maskable[:, :-1]
        words = np.cumsum(~follows, axis=1) - 1
        if self.arguments.masking_unit == "whole_word":
            return words
        return _spans(words, maskable, key)

    def _select(self, units: np.ndarray, maskable: np.ndarray, key: tuple[np.ndarray, ...]) -> np.ndarray:
        """Which tokens are to be predicted; bool [n, L]."""
        budget = np.rint(self.arguments.mlm_probability * maskable.sum(axis=1)).astype(np.int64)  # [n]
        luck = uniform(MASK_SELECTION, *key, units)
        if self.arguments.masking_unit != "token":
            rows = zip(units, luck, maskable, budget, strict=True)
            return np.stack([_whole_units(*row) for row in rows])
        rank = np.argsort(np.argsort(np.where(maskable, luck, 2.0), axis=1), axis=1)
        return rank < budget[:, None]

    def _replace(
        self, blocks: np.ndarray, decision_of: np.ndarray, key: tuple[np.ndarray, ...]
    ) -> np.ndarray:
        """What each token becomes if it is selected; int64 [n, L]."""
        decision = uniform(MASK_DECISION, *key, decision_of)
        bits = random_bits(MASK_REPLACEMENT, *key, np.arange(blocks.shape[1])[None])
        random_token = self.replacements[(bits % np.uint64(len(self.replacements))).astype(np.int64)]
        masked, random = self.arguments.mask_replace_prob, self.arguments.random_replace_prob
        kept_or_random = np.where(decision < masked + random, random_token, blocks)
        return np.where(decision < masked, self.mask_id, kept_or_random)

    def _gather(self, blocks: np.ndarray, selected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and labels of the selected tokens, padded; int64 [n, capacity] each."""
        capacity = self.capacity(blocks.shape[1])
        # A stable sort of "not selected" brings the selected positions to the front, in order.
        positions = np.argsort(~selected, axis=1, kind="stable")[:, :capacity]
        used = np.take_along_axis(selected, positions, axis=1)
        labels = np.where(used, np.take_along_axis(blocks, positions, axis=1), IGNORED)
        return np.where(used, positions, 0), labels

    def document_ids(self, blocks: np.ndarray) -> np.ndarray:
        """The number of the document that a token belongs to within its block; a [SEP] ends one; [n, L]."""
        ends = blocks == self.separator_id
        return np.cumsum(ends, axis=1) - ends


def is_word_piece(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether pieces that continue a word begin with ##."""
    return type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"


def _spans(words: np.ndarray, maskable: np.ndarray, key: tuple[np.ndarray, ...]) -> np.ndarray:
    """Cut each block's words (numbers, [n, L]) into spans of whole words; special tokens end a span."""
    most = words.max() + 1
    draws = uniform(SPAN_LENGTH, *key, np.arange(most)[None])  # [n, most]
    longer = 1 - SPAN_PROBABILITY
    # The inverse of the geometric distribution, cut off (not clipped) at the longest span.
    lengths = 1 + np.floor(np.log1p(-draws * (1 - longer**LONGEST_SPAN)) / np.log(longer)).astype(np.int64)
    ends = np.cumsum(lengths, axis=1)
    spans = np.stack([np.searchsorted(e, w, side="right") for e, w in zip(ends, words, strict=True)])
    # A span that a special token interrupts becomes two.
    return spans * words.shape[1] + np.cumsum(~maskable, axis=1)


def _whole_units(units: np.ndarray, luck: np.ndarray, maskable: np.ndarray, budget: int) -> np.ndarray:
    """Take whole units of one block in random order as long as they fit the budget; bool [L]."""
    candidates, first, sizes = np.unique(units[maskable], return_index=True, return_counts=True)
    taken = []
    for i in np.argsort(luck[maskable][first], kind="stable"):
        if sizes[i] <= budget:
            taken.append(candidates[i])
            budget -= sizes[i]
    return np.isin(units, taken) & maskable
