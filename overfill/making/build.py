"""Builds a pair folder from a full model: scores, plans, cuts, fits, and writes the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest, UnsupportedModel
from overfill.making.atomic import atomic_folder
from overfill.making.checkpoint import link_relatively, write_decoder
from overfill.making.conversations import Conversation, Transcript, digest_of, encode
from overfill.making.correction import read_correction
from overfill.making.fit import check_enough, fit
from overfill.making.head_plan import HeadPlan
from overfill.making.layer_selection import choose_layers
from overfill.making.layerwise import PackedTranscripts, fold_norms
from overfill.making.overlap import TextDigests
from overfill.making.pair_json import write_manifest
from overfill.making.prune import Scores, make_pruning_plan, score, slice_weights
from overfill.making.recipe import DecoderRecipe
from overfill.making.seal import record_checksums
from overfill.making.sensitivity import measure_sensitivity
from overfill.model.config import ModelConfig
from overfill.model.digest import checkpoint_digest
from overfill.model.loading import Weights, load_weights
from overfill.model.manifest import Pair
from overfill.pair.hf_config import decoder_config
from overfill.process.memory import freed_memory_kept
from overfill.telemetry.progress import Report, silent

SCORES_FILE = "scores.safetensors"
SHIPPED_SCORES = Path(__file__).parent / "data" / SCORES_FILE
"""Scores of the named pairs' full model (how to renew them: CONTRIBUTING.md). They save a minute on first start."""
SCORING_TOKENS = 6_144
SENSITIVITY_TOKENS = 3_072
SENSITIVITY_ROWS = 512  # tokens in one forward and backward pass, which holds all their activations
SCORED_TRANSCRIPT_TOKENS = 2_048
"""Longest transcript in such a pass, which takes about 5 MB per token at 8B."""
LAYER_TOKENS = 512


@freed_memory_kept()
def build_pair(
    full: Path,
    out: Path,
    recipe: DecoderRecipe,
    conversations: Sequence[Conversation],
    *,
    calibration: str = "shipped",
    correction: Path | None = None,
    sealed: bool = False,
    report: Report = silent,
) -> Pair:
    """Builds a pair and moves it to ``out`` once it is whole; replaces an existing folder.

    ``out/full`` becomes a relative link to ``full``. When the recipe has the full model's own sizes, the decoder is the
    full model itself, quantised or not: an identity pair. Otherwise ``scores.safetensors`` keeps the scores, and
    ``text_digests.bin`` digests of the calibration text. Until the pair is whole, the scores are in
    ``kept_scores(out)``, where the next build finds them if a later step fails.

    Args:
        full: Folder of the full model's checkpoint.
        out: Folder of the new pair.
        recipe: Sizes of the decoder, and the methods that make it.
        conversations: Calibration text. The full model wrote the answers, or they are in its style.
        calibration: Name of the text's source, recorded in ``pair.json``.
        correction: Path of a correction's files without ``-1-of-N.safetensors``, such as ``CORRECTIONS / "fast"``
            (``overfill.making.correction``), to add to the fitted decoder. When it is for another fit, the pair is
            built without it; ``report`` and ``pair.json`` say so.
        sealed: True records the files' checksums, as the cache of named pairs needs them.
        report: Called with a description of the step, its progress and its total.

    Raises:
        InvalidPair: ``full`` is not a usable checkpoint, or the correction is damaged.
        InvalidRequest: A size is out of range, or there is too little calibration text.
        UnsupportedModel: The engine does not run ``full``, its files hold quantised weights, or plain
            transformers could not run the decoder.
    """
    with atomic_folder(out) as folder:
        _fill(folder, full, recipe, conversations, calibration, correction, kept_scores(out), report)
        if sealed:
            record_checksums(folder)
    kept_scores(out).unlink(missing_ok=True)
    return Pair.load(out)


def kept_scores(out: Path) -> Path:
    """Returns the file beside the pair ``out`` that keeps its scores while the pair is not whole."""
    return out.with_name(f"{out.name}.{SCORES_FILE}")


def _fill(
    folder: Path,
    full: Path,
    recipe: DecoderRecipe,
    conversations: Sequence[Conversation],
    calibration: str,
    correction: Path | None,
    kept: Path,
    report: Report,
) -> None:
    config = ModelConfig.load(full)
    config.check_plain(full)
    sizes = recipe.sizes(config)
    if config.tail_rank:
        raise UnsupportedModel(f"{full} is a decoder with a head in two parts; build from its full model")
    link_relatively(folder / "full", full)
    if sizes == DecoderRecipe().sizes(config):
        write_manifest(folder, decoder="full", recipe={"quantize": recipe.quantize}, report=report)
        return
    transcripts = encode_calibration(full, config, conversations)
    fits = recipe.fit == "least-squares"
    packed = PackedTranscripts.of(limit_answer_tokens(transcripts, recipe.tokens))
    if fits:
        check_enough(packed, config, sizes)
    # Refuses sizes that transformers cannot run, before the long steps start.
    full_config = json.loads((full / "config.json").read_text(encoding="utf-8"))
    decoder_config(
        full_config,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["layers"],
        tie_word_embeddings=False,
    )
    trained = None if correction is None else read_correction(correction)
    weights = _load(full, config)
    digest = checkpoint_digest(full, report)
    shipped = None
    if calibration == "shipped" and SHIPPED_SCORES.exists():
        shipped = Scores.load(SHIPPED_SCORES, digest)
    scores = shipped or _measured(weights, config, transcripts, digest, kept, report)
    scores.save(folder / SCORES_FILE, digest)
    judged = PackedTranscripts.of(limit_answer_tokens(transcripts, LAYER_TOKENS))
    plan = make_pruning_plan(
        scores,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        layers=choose_layers(weights, config, judged, sizes["layers"], report),
        method=recipe.method,
    )
    head = _head_plan(config, sizes, scores, transcripts)
    decoder = fit(weights, config, plan, packed, report, head) if fits else slice_weights(weights, plan, head)
    facts = recipe.as_json(**sizes, calibration=calibration, fitted_on_answer_tokens=len(packed.answers) if fits else 0)
    if trained is not None:
        other = trained.differs_in(fit_key(digest, config, recipe, scores, transcripts))
        if other is None:
            facts["correction"] = {"digest": trained.digest, "answer_tokens": trained.facts["answer_tokens"]}
        else:
            facts["correction"] = {"left_out": f"it was trained with another {other}"}
            report(f"Built without the trained correction: it was trained with another {other}", 1, 1)
            trained = None
    text = TextDigests.of(conversations)
    (text if trained is None else text | trained.text).save(folder)
    (folder / "decoder").mkdir()
    write_decoder(
        folder / "decoder",
        full,
        decoder,
        None if head is None else head.as_config(),
        None if trained is None else trained.add_to,
    )
    write_manifest(folder, recipe=facts, full_digest=digest, layer_map=plan.layers, report=report)


def fit_key(
    full_digest: str, config: ModelConfig, recipe: DecoderRecipe, scores: Scores, transcripts: Sequence[Transcript]
) -> dict[str, Any]:
    """Returns what a fit depends on, by the parts of a correction's key. It is equal on all machines.

    Args:
        config: The full model's config.
        transcripts: All calibration text.
    """
    return {
        "full": full_digest,
        "recipe": recipe.as_json(**recipe.sizes(config), tokens=recipe.tokens),
        "scores": scores.digest,
        "text": digest_of(transcripts),
    }


def _head_plan(
    config: ModelConfig, sizes: Mapping[str, int], scores: Scores, transcripts: Sequence[Transcript]
) -> HeadPlan | None:
    """Ranks tokens by their share of the calibration text plus the probability that the full model gives them."""
    if sizes["head_tokens"] == config.vocab_size:
        return None
    text = torch.tensor([token for transcript in transcripts for token in transcript.token_ids])
    shares = text.bincount(minlength=config.vocab_size) / len(text) + scores.token_shares
    shares[list(config.eos_token_ids)] = 1  # cut text may lack them; end-of-sequence tokens always keep their rows
    return HeadPlan(shares, sizes["head_tokens"], sizes["tail_rank"])


def _measured(
    weights: Weights,
    config: ModelConfig,
    transcripts: Sequence[Transcript],
    full_digest: str,
    kept: Path,
    report: Report,
) -> Scores:
    """Returns the scores that a failed build left in ``kept``, or measures them and writes them there.

    Scores of another full model or of other text are measured again.
    """
    scored = limit_answer_tokens(shorten(transcripts, SCORED_TRANSCRIPT_TOKENS), SCORING_TOKENS)
    text_digest = digest_of(scored)
    if kept.exists() and (found := Scores.load(kept, full_digest, text_digest)) is not None:
        report(f"Using the scores in {kept}", 1, 1)
        return found
    small_parts = PackedTranscripts.of(limit_answer_tokens(scored, SENSITIVITY_TOKENS), SENSITIVITY_ROWS)
    sensitivity = measure_sensitivity(weights, config, small_parts, report)
    scores = score(weights, config, PackedTranscripts.of(scored), sensitivity, report)
    scores.save(kept, full_digest, text_digest)
    return scores


def encode_calibration(full: Path, config: ModelConfig, conversations: Sequence[Conversation]) -> list[Transcript]:
    transcripts = encode(conversations, Tokenizer.load(full), config.max_positions)
    if not transcripts:
        raise InvalidRequest(
            "calibration", "holds no answers that fit the model's context; give conversations with shorter prompts"
        )
    return transcripts


def _load(full: Path, config: ModelConfig) -> Weights:
    return fold_norms(load_weights(full, config, torch.float32, torch.device("cpu")))


def limit_answer_tokens(transcripts: Sequence[Transcript], answer_tokens: int) -> list[Transcript]:
    """Returns the first transcripts that together have ``answer_tokens``; the last one is cut to fit.

    When all together have fewer, returns all of them.
    """
    taken: list[Transcript] = []
    left = answer_tokens
    for transcript in transcripts:
        if left <= 0:
            break
        answer = len(transcript.answer)
        end = transcript.answer_start + min(answer, left)
        taken.append(Transcript(transcript.token_ids[:end], transcript.answer_start))
        left -= answer
    return taken


def shorten(transcripts: Sequence[Transcript], tokens: int) -> list[Transcript]:
    """Cuts each transcript to ``tokens``: its prompt loses the beginning, and an answer that is as long its end."""
    cut = []
    for transcript in transcripts:
        begin = max(0, min(len(transcript.token_ids) - tokens, transcript.answer_start - 1))
        cut.append(Transcript(transcript.token_ids[begin:][:tokens], transcript.answer_start - begin))
    return cut
