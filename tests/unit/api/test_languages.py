"""Tests that streamed text in many languages equals the whole text, for several answers at once, with stop strings."""

import random

import pytest

from overfill.api.answer_text import AnswerText
from overfill.api.detokenizer import StreamDetokenizer
from overfill.routing.answer import AnswerDelta

TEXTS = {
    "Arabic": "السلام عليكم، كيف حالكم اليوم؟ لغةٌ جميلة.",
    "Armenian": "Բարև, ինչպե՞ս եք։",
    "Bengali": "আমি বাংলায় গান গাই, আমি বাংলার গান গাই।",
    "Burmese": "မင်္ဂလာပါ နေကောင်းလား။",
    "Chinese": "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Devanagari": "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय ज्ञान।",
    "Emoji": "👩‍👩‍👧‍👦 👋🏽 🏳️‍🌈 🇩🇪🇯🇵 ❤️‍🔥 1️⃣ 🧑🏿‍🚀",
    "Ethiopic": "ሰላም ለዓለም፣ እንደምን ነህ?",
    "Finnish": "Älä lyö lööppiä läskillä.",
    "Georgian": "გამარჯობა, როგორ ხარ?",
    "German": "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich – „süß“!",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "Hebrew": "שָׁלוֹם עוֹלָם, מה שלומך היום?",
    "Icelandic": "Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.",
    "Japanese": "いろはにほへと ちりぬるを、カタカナもＡＢＣも。",
    "Khmer": "សួស្តីពិភពលោក តើអ្នកសុខសប្បាយទេ?",
    "Korean": "키스의 고유조건은 입술끼리 만나야 한다.",
    "Math": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, 𝔸𝕓𝓬 ≠ ABC ∎",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "Polish": "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Tamil": "வணக்கம் உலகமே, நீங்கள் எப்படி இருக்கிறீர்கள்?",
    "Thai": "สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง",
    "Tibetan": "བཀྲ་ཤིས་བདེ་ལེགས།",
    "Turkish": "Pijamalı hasta yağız şoföre çabucak güvendi. İıŞşĞğ",
    "Ukrainian": "Чуєш їх, доцю, га? Кумедна ж ти, прощайся без ґольфів!",
    "Urdu": "ہیلو دنیا، آپ کیسے ہیں؟",
    "Vietnamese": "Do bạch kim rất quý, sẽ dùng để lắp vô xương.",
    "Zalgo": "Z̸̢͓̈́a̴̛̰͝l̷̰̈́g̵̙̾o̶͇͝ \u200dü̲ a\u0301\u0323",
}
STOPPED = "｡ﾟ終わり🛑 ﾟ"


@pytest.fixture
def tokenizer(any_tokenizer):
    return any_tokenizer


def encode(tokenizer, text):
    return tokenizer.encode_continuation(text)


def interleave(tokenizer, answers, stops, rng):
    """Feeds each answer's token ids to its own text, in turns of random lengths; returns pieces and stop strings."""
    texts = [AnswerText(StreamDetokenizer(tokenizer), stops) for _ in answers]
    pieces, fed = [[] for _ in answers], [0] * len(answers)
    open_ = set(range(len(answers)))
    while open_:
        index = rng.choice(sorted(open_))
        ids = answers[index][fed[index] : fed[index] + rng.choice([1, 1, 1, 2, 3, 8])]
        if ids and texts[index].stop is None:
            pieces[index].append(texts[index].push(AnswerDelta(fed[index], list(ids))).text)
            fed[index] += len(ids)
            continue
        open_.discard(index)
        if texts[index].stop is None and (rest := texts[index].finish()) is not None:
            pieces[index].append(rest.text)
    return pieces, [text.stop for text in texts]


def test_many_languages_at_once(tokenizer):
    rng = random.Random(1)
    answers = [encode(tokenizer, text) for text in TEXTS.values()]
    expected = [tokenizer.decode(ids) for ids in answers]
    assert sum(a == b for a, b in zip(expected, TEXTS.values(), strict=True)) >= len(TEXTS) - 3, (
        "otherwise the test proves little"
    )
    pieces, stops = interleave(tokenizer, answers, [], rng)
    assert ["".join(each) for each in pieces] == expected
    assert set(stops) == {None}
    for each in pieces:
        for piece in each:
            piece.encode()  # never half a character
            assert "\ufffd" not in piece


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_of_many_bytes_wherever_tokens_are_cut(tokenizer, seed):
    rng = random.Random(seed)
    answers, expected = [], []
    for text in TEXTS.values():
        cut = rng.randrange(1, len(text))
        whole = tokenizer.decode(encode(tokenizer, text[:cut] + STOPPED + text[cut:]))
        answers.append(encode(tokenizer, text[:cut] + STOPPED + text[cut:]))
        expected.append(whole[: whole.index(STOPPED)])
    pieces, stops = interleave(tokenizer, answers, [STOPPED, STOPPED + "!", "🛑🛑"], rng)
    assert ["".join(each) for each in pieces] == expected
    assert set(stops) == {STOPPED}


def test_bytes_of_tokens_join_to_the_text(tokenizer):
    for text in TEXTS.values():
        ids = encode(tokenizer, text)
        joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
        assert joined.removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")
