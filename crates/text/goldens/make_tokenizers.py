"""Trains four miniature byte-level BPE tokenizers and writes down what Hugging Face makes of awkward strings.

    pip install tokenizers && python crates/text/goldens/make_tokenizers.py

Each uses the normalizer, pre-tokenizer and merge rule of one model family (SmolLM2, Llama 3, Qwen 2, GPT-2),
so that the file tests our reading of GGUF's `tokenizer.ggml.pre` against the library those models ship for.
Output: tokenizers.json beside this file.
"""
import json, pathlib
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ALT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
gpt2 = lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
by_pattern = lambda digits: pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(ALT % digits), behavior="isolated", invert=False),
    pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
FAMILIES = {
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()]), False),
    "llama-bpe": (None, by_pattern("{1,3}"), True),
    "qwen2": (normalizers.NFC(), by_pattern(""), False),
    "gpt-2": (None, gpt2(), False),
}
CORPUS = """It's 12,345.67 o'clock; we'll say they've 1234567 reasons, won't they? I'd go. THEY'RE HERE. Don't!
def main(argc, argv):\r\n\treturn {"key": [1, 2, 3.14159], 'other': None}  # 100% done\r\n
Straße, café, naïve, Ελληνικά, Русский текст, עברית, العربية مرحبا بالعالم, हिन्दी, 日本語のテキスト, 中文字符, 한국어.
   indented   text\n\n\n    four spaces\ttab\t\ttabs \n \n  end  \nhttps://example.org/a_b?c=d&e=f#g <tag attr="v">x</tag>
user assistant system <tool_call> the The THE and And of to in is was for on that with as at by from hello world
""".split("\n")
AWKWARD = [
    "", " ", "  ", "   ", "a", " a", "  a", "a ", "a  ", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\t", "\t\t x", "a\tb",
    "hello world", "Hello, World!", " hello  world ", "hello\nworld", "hello\r\nworld\r\n", "x\n\n\ny", "x \n \n y", "  \n\n  z",
    "0", "7", "12", "123", "1234", "12345678901234567890", " 1", " 12 34", "1,234.56", "3.14159", "a1b2c3", "x86_64", "2024-01-31T23:59:59Z",
    "½ ² ٣٤٥ 一二三 Ⅷ ४२", "1st 2nd 3rd", "0x1F 1e-5 -7 +8",
    "it's", "IT'S", "they're we've I'm you'll he'd don't", "THEY'RE WE'VE I'M", "'s 't 're", "rock'n'roll ''quoted'' 'tis", "it’s they’re", "'ſ 'ſx K'S",
    "日本語", "日本語のテキスト、中文。", "中文字符 mixed with English", "한국어 텍스트", "ﾊﾝｶｸ　全角　ＡＢＣ",
    "العربية مرحبا بالعالم ١٢٣", "עברית שלום", "हिन्दी में", "ไทยไม่มีช่องว่าง", "Ελληνικά Ωμέγα", "Русский текст",
    "e\u0301 cafe\u0301 n\u0303", "é café ñ", "A\u030a Å \u212b", "Z\u0351\u036b\u0343a\u0363\u030el\u030fg\u0321o\u0321", "\u0301\u0301", "ffi ﬁ ﬀ", "가 가",
    "😀", "a😀b", "👍🏽", "👨‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪🇯🇵", "👩🏿‍🚀 in 🚀", "\u200d\u200b\u2060\ufeff", "\ufeffBOM", "soft\u00adhyphen",
    "\u00a0nbsp\u00a0\u00a0x", "\u2003em\u2003space", "\u3000\u3000ideographic", "\u0085nel\u2028ls\u2029ps", "\x0b\x0cvt ff", "\x00nul\x01\x1f\x7f", "\x1c\x1d\x1e\x1fa", "\u180e mvs", "\u200b\u200bzw sp",
    "<|im_start|>user\nHi<|im_end|>\n", "<|im_end|>", "<|im_end|><|im_end|>", "a<|im_end|>b", " <|im_end|> ", "<|im_end|", "<|im_|im_end|>", "<|IM_END|>",
    "<tool_call>{\"name\": \"f\"}</tool_call>", "x<tool_call>y", "<|endoftext|>\n<|im_start|>assistant\n",
    "a" * 300, "ab" * 200, "supercalifragilisticexpialidocious" * 8, "1" * 100, " " * 100, "\n" * 50, " \n" * 40, "." * 80, "=" * 33 + " " + "-" * 33, "日" * 80, "😀" * 30, "é" * 90,
    "    def f(x):\n        return x ** 2\n", "\tif (a && b) {\r\n\t\tc();\r\n\t}\r\n", "{\"a\": [1, 2.5, null, true], \"b\": {}}", "SELECT * FROM t WHERE x <> 'it''s';",
    "https://example.org/a_b?c=d&e=%20#g", "user@example.com", "C:\\Users\\x\\n", "snake_case camelCase PascalCase kebab-case SCREAMING_CASE", "$100.00 €50 £7 ¥9", "#hash @at ^caret ~tilde `tick`",
    "!!!???...", "—–‒ “quoted” ‘single’ …", "¿Qué? ¡Sí!", "a,b;c:d|e/f", "((()))[[{}]]", "1+1=2; a!=b", "Ünïcödé ßẞ İıÐð Þþ", "ǅ ǆ Ǆ", "𝐀𝐁𝐂 𝟏𝟐𝟑", "𐍈𐌰 𒀀", "\U000e0041tag", "\uffff\ufffe \ufffd",
    "trailing spaces   ", "   leading", "mixed \t \n \t whitespace", "a \n", "a\n b\n  c\n   d", "word " * 20,
]

def main():
    out = {"awkward": AWKWARD, "families": {}}
    for pre, (normalizer, pre_tokenizer, ignore_merges) in FAMILIES.items():
        tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        if normalizer:
            tok.normalizer = normalizer
        tok.pre_tokenizer = pre_tokenizer
        tok.decoder = decoders.ByteLevel()
        special = [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
        trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=special, show_progress=False,
                                      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
        tok.train_from_iterator(CORPUS * 3, trainer)
        tok.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
        file = json.loads(tok.to_str())
        vocab = tok.get_vocab(with_added_tokens=True)
        tokens = [t for t, _ in sorted(vocab.items(), key=lambda p: p[1])]
        kinds = {a["id"]: 3 if a["special"] else 4 for a in file["added_tokens"]}
        ids = [tok.encode(s, add_special_tokens=False).ids for s in AWKWARD]
        tok.encode_special_tokens = True
        out["families"][pre] = {
            "tokens": tokens, "token_types": [kinds.get(i, 1) for i in range(len(tokens))],
            "merges": [" ".join(m) for m in file["model"]["merges"]],
            "pipeline": {k: file[k] for k in ("normalizer", "pre_tokenizer", "decoder")}, "ignore_merges": ignore_merges,
            "ids": ids, "plain_ids": [tok.encode(s, add_special_tokens=False).ids for s in AWKWARD],
            "decoded": [tok.decode(i, skip_special_tokens=False) for i in ids],
        }
    path = pathlib.Path(__file__).with_name("tokenizers.json")
    text = json.dumps(out, separators=(",", ":"))
    path.write_text(text + "\n")
    print(f"{path}: {len(text)} bytes, {len(AWKWARD)} strings")

if __name__ == "__main__":
    main()
