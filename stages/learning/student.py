"""Students: models before, during and after training.

A start is the teacher with fewer layers, or any model. If its width is not the teacher's, a projection into
the teacher's space is added and trained. It is exported with the student, so that a student can search an
index that the teacher built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.learning import ranks
from stages.models.config import NO_PROMPTS
from stages.models.devices import autocast
from stages.models.encoder import token_batches
from stages.models.likeness import likeness
from stages.models.lineage import LINEAGE
from stages.models.loading import is_normalize, leaves_out_prompts, save_model
from stages.models.mixing import MixedIds, mixed_features
from stages.models.packed import CANNOT_PACK, PackedReader
from stages.models.portable import STATIC
from stages.outcome import log, write_json
from storage.errors import TeachonceError, first_line
from storage.roles import Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


PACKED_TOKENS = 8192
"""Tokens of a piece without padding: 128 texts of 64. Each piece costs a gradient of all weights."""
PIECE_TOKENS = {"cpu": 1024, "mps": 4096}
"""Tokens of a padded piece, by device: small pieces have less padding, large ones fill a GPU."""
GPU_PIECE_TOKENS = 32768

Rows = Sequence[NDArray[np.int32] | MixedIds]
"""Token ids of texts, or mixes of two texts' token ids; all of one kind."""

PROBED_LENGTHS = (40, 33, 32, 12, 11, 9, 2)
"""Lengths in tokens of the texts on which reading without padding is tested."""


class Student(nn.Module):
    """A model in training: texts as token ids -> vectors in the teacher's space.

    Args:
        model: The start, loaded in float32.
        teacher_dim: D, the width of the teacher's vectors.
        unit_length: Whether the teacher's vectors have length 1; then the student's are normalised, too.
        project: Whether to add a projection even if the widths are equal.
        dropout: Whether dropout is active in training.
        prompts: Role -> what stands before the texts of that role; it is saved with the model.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        teacher_dim: int,
        unit_length: bool,
        project: bool,
        dropout: bool,
        prompts: Mapping[Role, str] = NO_PROMPTS,
    ) -> None:
        super().__init__()
        self.dropout, self.prompts = dropout, prompts
        self.unit_length = unit_length
        self.dim = teacher_dim
        width = model.get_embedding_dimension() or 0
        # A Normalize module of the start is removed: it would come before the projection, and whether the
        # student's vectors have length 1 depends on the teacher's.
        self.body = nn.ModuleList([module for module in model if not is_normalize(module)])
        needed = project or width != teacher_dim
        self.projection = nn.Linear(width, teacher_dim) if needed else None
        if self.projection is not None and width == teacher_dim:
            nn.init.eye_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        self.is_static = type(model[0]).__name__ == STATIC
        self.packed, self.equal_lengths = (None, False) if self.is_static else self._readers()
        # Tokens and texts of the largest piece of the last batch; the most tokens of a piece, once there
        # was no memory for more.
        self.largest_piece = (0, 0)
        self.most_tokens: int | None = None

    def halve_pieces(self) -> bool:
        """Read each batch twice from now on, in pieces half as large as the largest of the last batch.

        Call it where a device had no memory for a batch. Returns False if that piece cannot be halved.
        """
        tokens, texts = self.largest_piece
        if min(tokens, texts) < 2:
            return False
        self.most_tokens = tokens // 2
        log.info(
            "no memory for %d tokens at once: batches are read twice, in pieces of %d (gradient_caching)",
            tokens,
            self.most_tokens,
        )
        return True

    def forward(self, token_ids: Tensor, mask: Tensor, prompt_tokens: int = 0) -> Tensor:
        """Returns (B, D) float32 vectors of (B, L) token ids and mask, as the saved student would."""
        return self._to_teacher_space(self._padded(token_ids, mask, prompt_tokens))

    def _padded(self, token_ids: Tensor, mask: Tensor, prompt_tokens: int = 0) -> Tensor:
        """Returns (B, width) vectors before the projection, of (B, L) token ids and mask."""
        return self._through({"input_ids": token_ids, "attention_mask": mask}, prompt_tokens)

    def _through(self, features: dict[str, Any], prompt_tokens: int) -> Tensor:
        if prompt_tokens:
            features["prompt_length"] = prompt_tokens
        for module in self.body:
            features = module(features)
        vectors: Tensor = features["sentence_embedding"]
        return vectors

    def read(self, rows: Rows, *, pad_id: int, prompt_tokens: int = 0) -> Tensor:
        """Returns (B, D) vectors of B texts, longest first; unpadded if possible. Mixes are padded.

        Args:
            rows: Token ids of each text, or mixes.
            pad_id: The id of the padding token.
            prompt_tokens: How many of each text's first tokens the pooling leaves out, as their prompt.
        """
        mixes = [row for row in rows if isinstance(row, MixedIds)]
        if mixes:
            features = mixed_features(list(self.body), mixes)
            return self._to_teacher_space(self._through(features, prompt_tokens))
        texts = [row for row in rows if not isinstance(row, MixedIds)]
        if self.is_static:
            return self._to_teacher_space(self._through(self._bags(texts), prompt_tokens))
        if self.packed is not None:
            packed = self.packed(texts, np.arange(len(texts)), prompt_tokens)
            return self._to_teacher_space(packed)
        ids = [torch.from_numpy(row.astype(np.int64)) for row in texts]
        padded = pad(ids, pad_id=pad_id, device=next(self.parameters()).device)
        vectors: Tensor = self(*padded, prompt_tokens)
        return vectors

    def _bags(self, texts: Sequence[NDArray[np.int32]]) -> dict[str, Any]:
        """The features that a static model reads: all ids, and where each text begins."""
        device = next(self.parameters()).device
        ends = np.cumsum([0, *(len(row) for row in texts)])
        return {
            "input_ids": torch.from_numpy(np.concatenate(texts).astype(np.int64)).to(device),
            "offsets": torch.from_numpy(ends[:-1]).to(device),
        }

    @torch.no_grad()
    def check_mixing(self, *, address: str) -> None:
        """Check that a text mixed with nothing of a shorter one has the vector that it has by itself.

        Args:
            address: The model, to name in an error.

        Raises:
            TeachonceError: it has another, or the model does not read embeddings.
        """
        self.eval()
        try:
            table: Any = self.body[0]
            first = table.auto_model.get_input_embeddings().num_embeddings // 4
            ids = [first + np.arange(length, dtype=np.int32) for length in PROBED_LENGTHS]
            mixes = [MixedIds(row, ids[-1], 1.0) for row in ids]
            # One by one, as mixes may be padded and texts may not.
            own = torch.cat([self.read([row], pad_id=0) for row in ids])
            mixed = torch.cat([self.read([mix], pad_id=0) for mix in mixes])
            likeness(own.float().cpu().numpy(), mixed.float().cpu().numpy())
        except CANNOT_PACK as error:
            raise TeachonceError(
                address,
                f"the start cannot read mixed texts: {first_line(error)}",
                "take a start whose transformer reads `inputs_embeds`, or a recipe without `mixes`",
            ) from error

    @torch.no_grad()
    def _readers(self) -> tuple[PackedReader | None, bool]:
        """Test how texts can be read together.

        Returns:
            A reader without padding, or None if it changes a text's vector; and whether only texts of equal
            length may be read together, since padding changes vectors.
        """
        device = next(self.parameters()).device
        transformer: Any = self.body[0]
        try:
            # From the middle of the vocabulary, which has no special tokens.
            first = transformer.auto_model.get_input_embeddings().num_embeddings // 4
            ids = [first + np.arange(length, dtype=np.int32) for length in PROBED_LENGTHS]
            rows = [torch.from_numpy(row).long() for row in ids]
            self.eval()
            alone = torch.cat([self._padded(*pad([row], pad_id=0, device=device)) for row in rows])
        except CANNOT_PACK:
            return None, False  # it has no table of tokens
        own = alone.float().cpu().numpy()
        try:
            packed = PackedReader(self.body)
            likeness(own, packed(ids, np.arange(len(ids))).float().cpu().numpy())
            return packed, False
        except CANNOT_PACK as error:
            log.info("texts are padded for this student; without padding: %s", first_line(error))
        try:
            batch = self._padded(*pad(rows, pad_id=0, device=device))
            likeness(own, batch.float().cpu().numpy())
        except ValueError as error:
            log.info("only texts of one length are read together; in other batches: %s", error)
            return None, True
        return None, False

    def _to_teacher_space(self, vectors: Tensor) -> Tensor:
        """Project (B, width) vectors into the teacher's space: (B, D) float32."""
        if self.projection is not None:
            vectors = self.projection(vectors)
        vectors = vectors.float()
        return nn.functional.normalize(vectors, dim=1) if self.unit_length else vectors

    def train(self, mode: bool = True) -> Student:
        """Set training mode; without dropout, all submodules stay in inference mode."""
        super().train(mode and self.dropout)
        self.training = mode
        return self

    def save(self, folder: Path, lineage: Mapping[str, Any]) -> None:
        """Write a sentence-transformers folder of stock modules, and its lineage, into an empty folder."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Dense
        from sentence_transformers.sentence_transformer.modules import Normalize

        modules: list[nn.Module] = list(self.body)
        if self.projection is not None:
            dense = Dense(
                self.projection.in_features,
                self.projection.out_features,
                activation_function=nn.Identity(),
            )
            dense.linear.load_state_dict(self.projection.state_dict())
            modules.append(dense)
        if self.unit_length:
            modules.append(Normalize())
        model = SentenceTransformer(modules=modules, device="cpu")
        address = str(lineage.get("student", "student"))
        save_model(model, folder, address=address, prompts=self.prompts)
        write_json(folder / LINEAGE, lineage)


def encode_ids(
    student: Student,
    rows: Rows,
    *,
    pad_id: int,
    device: torch.device,
    precision: str,
    gradient_caching: bool,
    prompt_tokens: NDArray[np.int64] | None = None,
) -> Tensor:
    """Encode the token ids of B texts, or B mixes; returns (B, D) float32 vectors, in their order.

    The batch is divided among the ranks. Each reads its texts without padding; if the model cannot, it
    reads pieces of similar length, which need little padding. The vectors are those of the whole batch up
    to last bits. A student that had no memory for a batch reads smaller pieces, with gradient caching.

    Args:
        student: The student, on `device`.
        rows: Token ids of each text, special tokens included; the same on all ranks.
        pad_id: The id of the padding token.
        device: The device of the student.
        precision: Precision of matrix products: "fp32" or "bf16".
        gradient_caching: Keep only the vectors of a piece, and read the piece again, with the same dropout,
            when its gradient is computed: the memory of one piece, for a third more work (GradCache keeps
            the gradients of the vectors instead; the result is the same).
        prompt_tokens: (B,) how many of each text's first tokens are its prompt; None for none. Texts with
            prompts of different lengths are read apart if the student's pooling leaves prompts out.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    gradient_caching = gradient_caching or student.most_tokens is not None
    piece_tokens = _piece_tokens(student, lengths, device, gradient_caching=gradient_caching)
    student.largest_piece = (0, 0)
    left_out = np.zeros(len(rows), np.int64)
    if prompt_tokens is not None and leaves_out_prompts(student.body):
        left_out = prompt_tokens

    def read(batch: NDArray[np.int64]) -> Tensor:
        pieces, order = [], []
        for count in np.unique(left_out[batch]).tolist():
            alike = np.flatnonzero(left_out[batch] == count)
            do = partial(student.read, pad_id=pad_id, prompt_tokens=count)
            for places in token_batches(
                lengths[batch[alike]], piece_tokens, equal_lengths=student.equal_lengths
            ):
                texts = [rows[place] for place in batch[alike[places]]]
                tokens = len(texts) * max(map(len, texts))
                student.largest_piece = max(student.largest_piece, (tokens, len(texts)))
                with autocast(device, precision):
                    if gradient_caching:
                        pieces.append(checkpoint(do, texts, use_reentrant=False))
                    else:
                        pieces.append(do(texts))
                order.append(alike[places])
        return torch.cat(pieces)[torch.from_numpy(np.argsort(np.concatenate(order))).to(device)]

    return ranks.gather_rows(lengths, read)


def _piece_tokens(
    student: Student, lengths: NDArray[np.int64], device: torch.device, *, gradient_caching: bool
) -> int:
    """The most tokens of a piece of a batch whose texts have these lengths."""
    padded = PIECE_TOKENS.get(device.type, GPU_PIECE_TOKENS)
    if student.is_static:
        tokens = len(lengths) * int(lengths.max(initial=1))  # all at once
    elif student.packed is not None:
        tokens = min(padded, PACKED_TOKENS) if gradient_caching else PACKED_TOKENS
    else:
        tokens = padded
    return min(tokens, student.most_tokens or tokens)


def pad(rows: Sequence[Tensor], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right; returns (B, L) ids and (B, L) mask."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
    return ids.to(device), mask.to(device)
