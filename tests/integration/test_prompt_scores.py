"""Tests the log-probabilities of prompts on real stacks, against plain transformers."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from click.testing import CliRunner
from harness_tasks import flat, run_harness, write_tasks
from http_calls import call
from mocks import mock_stack
from stacks import idle, loads, running_stack, wait_until

from overfill.client import Client, InvalidRequest, SamplingParams
from overfill.pair.hf_model import load_hf_model
from overfill.pair.reference import TwoStageReference, _forward
from services.router.http import generate

END = 1  # the end-of-sequence token of tiny pairs
CLOSE = {"rel": 1e-4, "abs": 1e-4}


@pytest.fixture(scope="module")
def running(tiny_tiers):
    with running_stack(None, prefill=2, tiers=tiny_tiers, http=0, default_tier="full", max_num_batched_tokens="64") as (
        stack,
        address,
    ):
        yield stack.spec.openai_urls(stack.placed.addresses)[0], address


@pytest.fixture
def client(running):
    with Client(running[1]) as client:
        yield client


@pytest.fixture(scope="module")
def full(tiny_family):
    return load_hf_model(tiny_family["full"] / "full")


@torch.inference_mode()
def reference(full, prompt):
    """The log-softmax of the full model behind each token of ``prompt``. [tokens, vocab]"""
    return full(torch.tensor([prompt])).logits[0].double().log_softmax(-1)


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 500, (length,), generator=generator).tolist()


def ask(running, endpoint="completions", **fields):
    reply = call(f"{running[0]}/{endpoint}", {"model": "full" if "model" not in fields else "", **fields})
    return reply.status, json.loads(reply.body)


@pytest.mark.parametrize("length", [1, 2, 150])
def test_scores_are_the_full_model_s(running, client, full, length):
    ids = prompt(length)
    expected = reference(full, ids)
    for _ in range(2):  # a cached prefix has no logits
        answer = client.generate(ids, sampling=SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=4))
        assert len(answer.token_ids) == 3
        assert len(answer.prompt_logprobs) == length
        assert answer.prompt_logprobs[0] is None
        for row, token, entry in zip(expected, ids[1:], answer.prompt_logprobs[1:], strict=False):
            assert entry.logprob == pytest.approx(float(row[token]), **CLOSE)
            assert abs(entry.rank - 1 - int((row > row[token]).sum())) <= 1
            assert [value for _, value in entry.top] == pytest.approx(row.topk(4).values.tolist(), **CLOSE)
    wait_until(lambda: idle(running[1]), 5, "all blocks free")


def assert_echoed(choice, client, full, ids, k, answer_tokens):
    """Compares OpenAI's logprobs of prompt and answer with the reference's."""
    found, expected = choice["logprobs"], reference(full, ids)
    assert {len(values) for values in found.values()} == {len(ids) + answer_tokens}
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    scores = [float(row[token]) for row, token in zip(expected, ids[1:], strict=False)]
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(scores, **CLOSE)
    for row, top in zip(expected, found["top_logprobs"][1 : len(ids)], strict=False):
        assert max(top.values()) == pytest.approx(float(row.max()), **CLOSE)
        assert len(top) <= k  # tokens of one text count once
    assert found["text_offset"][0] == 0
    assert found["text_offset"] == sorted(found["text_offset"])


def test_echo_scores_a_batch_as_lm_eval_asks(running, client, full):
    prompts = [prompt(length, length) for length in (90, 1, 17)]
    fields = {"prompt": prompts, "temperature": 0, "seed": 1234, "echo": True, "logprobs": 1}
    status, answer = ask(running, **fields, max_tokens=1)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 3
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        assert_echoed(choice, client, full, ids, 1, 1)
    status, alone = ask(running, **fields, max_tokens=0)
    assert status == 200, alone
    assert alone["usage"]["completion_tokens"] == 0
    for ids, choice, with_token in zip(prompts, alone["choices"], answer["choices"], strict=True):
        assert_echoed(choice, client, full, ids, 1, 0)
        assert with_token["text"].startswith(choice["text"])
        assert choice["finish_reason"] == "length"


def test_echo_scores_text(running, client, full):
    text = "Write a short story about a river."
    _, answer = ask(running, prompt=text, echo=True, logprobs=5, max_tokens=4, temperature=0)
    assert answer["choices"][0]["text"].startswith(text)
    assert_echoed(answer["choices"][0], client, full, client.tokenize(text), 5, 4)


def test_an_answer_that_ends_at_once_leaves_one_more_score_than_the_prompt_has(running, client):
    """lm-eval cuts the last score off."""
    ends = {"logit_bias": {str(END): 100}}
    fields = {"prompt": prompt(9), "temperature": 0, "echo": True, "logprobs": 1, **ends}
    for max_tokens, expected in ((1, 10), (5, 9)):
        _, answer = ask(running, **fields, max_tokens=max_tokens)
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == expected


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_prompt_logprobs_have_vllm_s_shape(running, client, full, endpoint):
    if endpoint == "completions":
        ids = prompt(70)
        fields = {"prompt": ids}
    else:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        ids, fields = client.tokenize(messages), {"messages": messages}
    status, answer = ask(running, endpoint, **fields, prompt_logprobs=3, max_tokens=2)
    assert status == 200, answer
    found = (answer if endpoint != "completions" else answer["choices"][0])["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(ids)
    for row, token, entry in zip(reference(full, ids), ids[1:], found[1:], strict=False):
        own = entry.pop(str(token))
        assert own["logprob"] == pytest.approx(float(row[token]), **CLOSE)
        assert abs(own["rank"] - 1 - int((row > row[token]).sum())) <= 1
        assert own["decoded_token"] == client.detokenize([token]) or token < 8
        assert [one["rank"] for one in entry.values()] == [n for n in (1, 2, 3) if n != own["rank"]]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("echo", {"echo": True, "logprobs": 1, "tier": "default"}),
        ("prompt_logprobs", {"prompt_logprobs": 0, "tier": "fast"}),
        ("stream", {"echo": True, "logprobs": 1, "stream": True}),
        ("n", {"prompt_logprobs": 1, "n": 2}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "echo": True, "logprobs": 1}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 0, "echo": True}),
    ],
)
def test_what_is_refused_is_named(running, param, fields):
    status, answer = ask(running, prompt="Hi", **fields)
    assert (status, answer["error"]["param"]) == (400, param), answer
    if "tier" in fields:
        assert "'full'" in answer["error"]["message"]


def assert_same_scores(served, offline, tasks):
    """Compares what the harness computes with both models, and the likelihood of each continuation."""
    (found, scores), (expected, expected_scores) = (
        run_harness(model, tasks, ["tiny_choose", "tiny_read"]) for model in (served, offline)
    )
    for task in ("tiny_choose", "tiny_read"):
        assert flat(scores[task]) == pytest.approx(flat(expected_scores[task]), rel=1e-4, abs=1e-4)
    for task, metric in (("tiny_choose", "acc"), ("tiny_choose", "acc_norm"), ("tiny_read", "bits_per_byte")):
        assert found[task][f"{metric},none"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # the harness and its data sets emit warnings of their own
def test_lm_eval_scores_the_full_model_through_the_endpoint(running, tiny_family, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `pairs`")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from overfill.making.evaluate.lm_eval_adapter import LocalLM

    tasks, folder = write_tasks(tmp_path), tiny_family["full"]
    served = LocalCompletionsAPI(
        base_url=f"{running[0]}/completions",
        model="full",
        tokenizer_backend="huggingface",
        tokenizer=str(folder / "full"),
        batch_size=4,
        max_length=512,
    )
    assert_same_scores(served, LocalLM(folder, dtype="float32"), tasks)


def test_an_engine_that_cannot_score_prompts_is_named(tiny_family):
    with mock_stack(tiny_family["full"]) as stack:
        reply = call(f"{stack.url}/v1/completions", {"model": "", "prompt": "Hi", "prompt_logprobs": 1})
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["param"]) == (400, "prompt_logprobs")
    assert "mock does not score prompts" in error["message"]


def test_a_response_has_a_maximum_of_scores_before_any_is_computed(tiny_family, monkeypatch):
    monkeypatch.setattr(generate, "MAX_UNSTREAMED_LOGPROBS", 10)
    with mock_stack(tiny_family["full"]) as stack:
        body = {"model": "", "prompt": [[5, 6, 7]] * 3, "prompt_logprobs": 1}
        reply = call(f"{stack.url}/v1/completions", body)
    assert reply.status == 400
    assert "12 log-probabilities of 3 prompts" in json.loads(reply.body)["error"]["message"]


@torch.inference_mode()
def two_stage(folder, ids, start):
    """The log-softmax of the full model at token ``start``, and of the decoder at those after it. [tokens, vocab]"""
    two = TwoStageReference(folder)
    cache, first = two._prefill(ids[:start])
    rest = _forward(two._decoder, ids[start:-1], start, cache) if start < len(ids) - 1 else first[:0]
    return torch.cat([first, rest]).double().log_softmax(-1)


@pytest.mark.parametrize(("length", "start"), [(2, 1), (90, 89), (90, 70), (150, 7)])
@pytest.mark.parametrize("tier", ["default", "fast", "full"])
def test_scores_from_answer_start_on_are_the_decoder_s(running, client, tiny_family, tier, length, start):
    ids = prompt(length, start)
    expected = two_stage(tiny_family[tier], ids, start)
    sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2)
    for cached in (False, True):
        answer = client.generate(ids, sampling=sampling, answer_start=start, tier=tier)
        assert answer.prompt_logprobs[:start] == (None,) * start
        found = answer.prompt_logprobs[start:]
        assert [entry.logprob for entry in found] == pytest.approx(
            [float(row[token]) for row, token in zip(expected, ids[start:], strict=True)], **CLOSE
        )
        assert [[value for _, value in entry.top] for entry in found] == [
            pytest.approx(row.topk(2).values.tolist(), **CLOSE) for row in expected
        ]
        assert cached is False or answer.usage.cached_tokens == (start - 1) // 16 * 16
        assert len(answer.token_ids) == 4
    wait_until(lambda: idle(running[1]), 5, "all blocks free")


def test_the_answer_behind_answer_start_is_the_decoder_s_from_its_first_token_on(client, tiny_family):
    """No KV that the decoder wrote is found by the next request with the same prompt."""
    ids = prompt(100, 5)
    two = TwoStageReference(tiny_family["default"])
    plain = two.generate(ids, 6)
    sampling = SamplingParams(temperature=0, max_tokens=6)
    scoring = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=0)
    split = client.generate(ids, sampling=scoring, answer_start=40, tier="default").token_ids
    assert list(client.generate(ids, sampling=sampling, tier="default").token_ids) == plain
    cache, _ = two._prefill(ids[:40])
    with torch.inference_mode():
        logits = _forward(two._decoder, ids[40:], 40, cache)
    assert split[0] == int(logits[-1].argmax())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"answer_start": 0}, "must be at least 1 and less than the prompt's 30 tokens; got 0"),
        ({"answer_start": 30}, "got 30"),
        ({"answer_start": 5, "sampling": SamplingParams()}, "only for requests that score their prompt"),
        ({"answer_start": 5, "truncate_prompt_tokens": 9}, "leave truncate_prompt_tokens out"),
    ],
)
def test_an_answer_start_that_does_not_fit_is_refused(client, options, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        client.generate(prompt(30), **({"sampling": SamplingParams(prompt_logprobs=0)} | options))
    assert caught.value.field == "answer_start"


@pytest.mark.filterwarnings("ignore")  # the harness and its data sets emit warnings of their own
@pytest.mark.parametrize("tier", ["default", "full"])
def test_lm_eval_scores_a_tier_as_the_pair_alone(running, tiny_family, tmp_path, tier):
    pytest.importorskip("lm_eval", reason="needs the extra `pairs`")
    from overfill.cli.evaluate import lm_eval_command

    tasks = write_tasks(tmp_path)
    arguments = [str(tiny_family[tier]), "--tasks", "tiny_choose,tiny_read,tiny_write", "--json"]
    arguments += ["--include-path", str(tasks)]
    here = CliRunner().invoke(lm_eval_command, [*arguments, "--dtype", "float32"])
    served = CliRunner().invoke(lm_eval_command, [*arguments, "--address", running[1]])
    assert (here.exit_code, served.exit_code) == (0, 0), served.output
    expected, found = json.loads(here.stdout), json.loads(served.stdout)
    for task in ("tiny_choose", "tiny_read", "tiny_write"):
        for metric, figures in expected[task].items():
            assert found[task][metric]["value"] == pytest.approx(figures["value"], rel=1e-4), (task, metric)
    refused = CliRunner().invoke(lm_eval_command, [*arguments, "--address", running[1], "--threads", "1"])
    assert "--address conflicts with --threads" in refused.output


def test_workers_with_both_stages_score_prompts_and_a_migrated_answer_has_its_scores_once(tiny_family):
    ids, start = prompt(90, 3), 40
    expected = two_stage(tiny_family["default"], ids, start)
    sampling = SamplingParams(temperature=0, max_tokens=300, prompt_logprobs=1, ignore_eos=True)
    with (
        running_stack(tiny_family["default"], 0, 0, colocated=2) as (stack, address),
        Client(address) as client,
    ):
        whole = client.generate(ids, sampling=sampling, answer_start=start)
        found = [entry.logprob for entry in whole.prompt_logprobs[start:]]
        scores = [float(row[token]) for row, token in zip(expected, ids[start:], strict=True)]
        assert found == pytest.approx(scores, **CLOSE)
        with client.stream(ids, sampling=sampling, answer_start=start) as stream:
            deltas = [next(stream)]
            (busy,) = [id for id, load in loads(address).items() if load.running]
            os.kill(stack.worker(busy).pid, signal.SIGKILL)
            deltas += stream
        assert stream.answer.migrations == 1
        assert [delta.prompt_logprobs is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
        assert stream.answer.token_ids == whole.token_ids
        again = [entry.logprob for entry in stream.answer.prompt_logprobs[start:]]
        assert again == pytest.approx(scores, **CLOSE)
