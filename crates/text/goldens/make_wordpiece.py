"""Expectations of Hugging Face's WordPiece, read by `tests/wordpiece.rs`.

    python3 -m venv venv && venv/bin/pip install tokenizers
    venv/bin/python crates/text/goldens/make_wordpiece.py

Writes `wordpiece.json`: a vocabulary trained on the strings below, three settings of BERT's normaliser, and the ids
of every string under each, with `[CLS]` and `[SEP]` around. Special tokens in the text are read as characters
(`encode_special_tokens`), which is what Bantam does with what people wrote.
"""
import json
import os

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

CORPUS = """
The quick brown fox jumps over the lazy dog. A bank transfer has not arrived; where is my card? Please refund me!
Embeddings are vectors of numbers, and similar texts have similar vectors. Unbelievable, misunderstanding, internationalisation.
My email is someone@example.com, call +1 (555) 010-9999 before 17:30 on 2024-02-29. It costs $1,234.56 or 50% less.
Der Fluß ist groß, die Straße naß. Ça va très bien, garçon; où êtes-vous? El niño pequeño está aquí, ¿verdad?
Привет, как дела? Съешь же ещё этих мягких французских булок. Γειά σου Κόσμε, καλημέρα. Tiếng Việt có dấu thanh.
東京は日本の首都です。今天天气很好,我们去公园。안녕하세요 세계 만나서 반갑습니다. ひらがなとカタカナ。
مرحبا بالعالم كيف حالك. שלום עולם מה שלומך. नमस्ते दुनिया आप कैसे हैं. สวัสดีชาวโลก. Здравствуйте мир.
fn main() { println!("{}", x[0] + y_1 * 2); } <html><body class="a-b">it's don't won't we're I'd</body></html>
"""

AWKWARD = [
    "", " ", "\t", "\n\r\n", "a", "A", "hello", "Hello, World!", "  leading and trailing  ", "double  spaces   inside",
    "tabs\tand\nnew\r\nlines", "non\u00a0breaking\u2003em\u3000ideographic", "line\u2028sep\u2029para\u0085nel",
    "zero\u200bwidth\u200c\u200djoin\ufeffbom", "soft\u00adhyphen", "word\u2060joiner", "\u200b", "\u00ad",
    "\x00", "nul\x00inside", "\x01\x02\x7f", "bell\x07esc\x1b[31mred", "\ufffd", "replacement\ufffdchar", "\u0080\u009f",
    "\ue000private", "\U000f0000\U0010ffff", "unassigned\u0378\U0001fbff", "\uffff\ufffe", "tag\U000e0041\U000e007f",
    "café", "cafe\u0301", "naïve façade", "ÀÉÎÕÜ", "Ångström \u212b", "ﬁ ﬂ ﬃ ligatures", "Straße STRASSE ẞ", "İstanbul ısı I i",
    "ΑΒΓΔ ΣΑΣ ς σ", "Ǆ ǅ ǆ ŉ", "Ⅷ ⅷ ½ ²³ ₁₂", "ℌ𝔢𝔩𝔩𝔬 𝓦𝓸𝓻𝓵𝓭 𝟘𝟙𝟚", "ｆｕｌｌ ｗｉｄｔｈ １２３", "Ёлка ёж Й й", "e\u0301\u0302\u0303 stacked",
    "\u0301", "\u0301\u0302 alone", "a\u0345b", "Z\u0351\u036b\u0343\u036aalgo", "ö o\u0308 ő", "đ Đ ø Ø ł Ł", "Tiếng Việt",
    "東京", "東京は日本の首都です。", "今天天气很好", "mixed中文and英文words", "한국어 텍스트", "\u1100\u1161\u11a8 jamo", "ひらがな カタカナ ｶﾀｶﾅ",
    "\U00020000\U0002a6df ext B", "\u3400\u4dbf ext A", "\uf900\ufaff compat", "\U0002f800 compat sup", "\U0002b740\U0002b81f\U0002b820 D E",
    "々〆〇", "、。「」『』【】", "〜～—–-−‐", "ー長音ー", "中\u0301文", "中 文", "\u9fff\ua000\u4e00\u33ff",
    "مرحبا بالعالم", "مَرْحَبًا", "שָׁלוֹם", "नमस्ते दुनिया", "क्षत्रिय", "สวัสดี", "ภาษาไทย", "বাংলা", "தமிழ்", "ქართული", "አማርኛ", "བོད་ཡིག", "ខ្មែរ", "မြန်မာ",
    "😀", "hello 😀 world", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪🇫🇷", "☃️ ☃", "1️⃣ #️⃣", "❤️‍🔥", "text😀text", "🏴\U000e0067\U000e0062\U000e007f", "© ® ™ ℠",
    "!", "...", "…", "?!?!", "a.b.c", "it's", "don't", "rock'n'roll", "“quotes” ‘single’ «guillemets»", "\"a\"'b'`c`", "a-b_c/d\\e|f",
    "(paren) [bracket] {brace} <angle>", "@user #tag $5 50% ^ & *", "~ ` ´ ¨ ˆ", "¡Hola! ¿Qué?", "a+b=c×d÷e", "€ £ ¥ ₿ ¢", "§ ¶ † ‡ •",
    "http://example.com/path?q=1&r=2#frag", "someone@example.com", "C:\\Users\\x", "2024-02-29T17:30:00Z", "$1,234.56", "+1 (555) 010-9999",
    "3.14159", "1e-10", "0xDEADBEEF", "v1.2.3-rc.4+build", "１２３４", "٣٤٥", "१२३", "x²+y²", "5'11\"", "a\u0300\u0301b\u0327c",
    "[CLS]", "[SEP]", "[UNK] [MASK]", "a[SEP]b", "[CLS] injected [SEP]", "[cls]", "[ SEP ]", "##ing", "## ing", "run##ning", "#", "##",
    "unbelievable", "misunderstanding", "internationalisation", "antidisestablishmentarianism", "supercalifragilisticexpialidocious",
    "a" * 99, "a" * 100, "a" * 101, "b" * 1000, "é" * 100, "é" * 101, "e\u0301" * 100, "e\u0301" * 60, "ß" * 100, "ß" * 101, "中" * 101, "İ" * 60,
    "x" * 100 + " " + "y" * 101, ("word " * 50).strip(), "a" * 100 + "!", "a" * 101 + "!", "😀" * 101, "\u200b" * 200 + "a", "a\u0301" * 101,
    "ALLCAPS", "MixedCaseWord", "camelCaseIdentifier", "snake_case_name", "kebab-case-name", "The QUICK Brown fox",
    "fn main() { println!(\"{}\", x[0]); }", "<html><body class=\"a-b\">", "if (a && !b || c) { d?.e }", "SELECT * FROM t WHERE a='b';",
    "\\n \\t \\u0041", "%20%F0", "&amp;&lt;", "line one\nline two\n\n\nline five", "a,b;c:d", "….,;:!?", "«a»b", "a’b", "a‘b’c", "l’été",
    "\u202eright to left\u202c", "\u2066isolate\u2069", "a\u034fb", "\u061cmark", "\ufe0f", "a\ufe0eb", "\U000e0100", "\u115f\u1160", "\u2800", "\u3164", "\u180e",
    "𐍈 𐌰", "𓀀", "𝒳", "\U0001d15e", "꧁꧂", "﷽", "ﷲ", "Ω Ω", "K K Å Å", "ſ", "ŒœÆæ", "ĳ Ĳ", "ﬀ", "ｱ", "゛ ゜", "か\u3099", "が",
    "where is my card?", "My transfer has NOT arrived!!!", "Please, refund me.", "similar texts have similar vectors",
]

SETTINGS = {
    "uncased": dict(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True),
    "cased": dict(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=False),
    "odd": dict(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False),
    "accents": dict(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=True),
}


def tokenizer(model, settings):
    out = Tokenizer(model)
    out.normalizer = normalizers.BertNormalizer(**settings)
    out.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return out


def main():
    trained = tokenizer(models.WordPiece(unk_token="[UNK]"), SETTINGS["cased"])
    lines = CORPUS.strip().splitlines() + [a for a in AWKWARD if "[" not in a]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIALS, show_progress=False, min_frequency=1,
                                        limit_alphabet=600)
    trained.train_from_iterator(lines + [line.lower() for line in lines], trainer)
    vocab = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    ids = {token: i for i, token in enumerate(vocab)}
    families = {}
    for name, settings in SETTINGS.items():
        tok = tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100), settings)
        tok.add_special_tokens(SPECIALS)
        tok.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(t, ids[t]) for t in SPECIALS[2:4]])
        tok.encode_special_tokens = True
        whole = json.loads(tok.to_str())
        pipeline = {k: whole[k] for k in ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"]}
        pipeline["model"] = {k: v for k, v in whole["model"].items() if k != "vocab"}
        families[name] = {"pipeline": pipeline, "ids": [tok.encode(text).ids for text in AWKWARD]}
    path = os.path.join(HERE, "wordpiece.json")
    with open(path, "w") as out:
        json.dump({"awkward": AWKWARD, "vocab": vocab, "families": families}, out, ensure_ascii=True, separators=(",", ":"))
        out.write("\n")
    unk = sum(i == 1 for f in families.values() for row in f["ids"] for i in row)
    total = sum(len(row) for f in families.values() for row in f["ids"])
    print(f"{len(AWKWARD)} strings, {len(vocab)} tokens, {total} ids of which {unk} are [UNK], {os.path.getsize(path)} bytes")


main()
