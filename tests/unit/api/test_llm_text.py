"""Tests the text of ``LLM``'s answers with a SentencePiece-like tokenizer, whose words include their leading space."""

from overfill import LLM
from overfill.request.params import SamplingParams


def test_a_completion_keeps_the_first_word_s_space(tiny_pair, sentencepiece_tokenizer):
    llm = LLM(tiny_pair, dtype="float32", device="cpu", kv_memory=2**20, max_model_len=256)
    llm.tokenizer = sentencepiece_tokenizer
    word = sentencepiece_tokenizer.encode("hello world")[-1]
    forced = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logit_bias={word: 100.0})
    assert llm.generate(["hello"], forced)[0].text == " world world"
    # A prompt of token ids has no text to continue, so the answer is a text of its own, as over the network.
    assert llm.generate([sentencepiece_tokenizer.encode("hello")], forced)[0].text == "world world"
