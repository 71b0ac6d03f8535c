"""Makes the first seeds of corpus/: small files, sound and unsound, of each format. Needs only Python."""

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def save(target: str, name: str, data: bytes) -> None:
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def text(s: str) -> bytes:
    raw = s.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, code: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + value


def array(code: int, items: list[bytes]) -> bytes:
    return struct.pack("<IQ", code, len(items)) + b"".join(items)


def tensor(name: str, dims: list[int], code: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def gguf(pairs: list[bytes], tensors: list[bytes], data: bytes, version: int = 3, align: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % align) + data


arch = pair("general.architecture", 8, text("llama"))
numbers = [
    pair(f"k{code}", code, struct.pack("<" + fmt, 1))
    for code, fmt in enumerate("BbHhIif?") if fmt != "?"
] + [pair("k7", 7, b"\1"), pair("k10", 10, bytes(8)), pair("k11", 11, bytes(8)), pair("k12", 12, bytes(8))]
lists = [
    pair("tokens", 9, array(8, [text("a"), text("Ġb")])),
    pair("types", 9, array(5, [struct.pack("<i", n) for n in (1, 3)])),
    pair("nested", 9, array(9, [array(0, [b"\1"]), array(6, [])])),
]
two = [tensor("a.weight", [4, 2], 0, 0), tensor("b.weight", [32], 8, 32)]
save("gguf", "sound", gguf([arch, *numbers, *lists], two, bytes(66)))
save("gguf", "sound-v2", gguf([arch], two, bytes(66), version=2))
save("gguf", "sound-empty", gguf([], [], b""))
save("gguf", "aligned-64", gguf([pair("general.alignment", 4, struct.pack("<I", 64))],
                                [tensor("a", [16], 0, 0), tensor("b", [1], 1, 64)], bytes(66), align=64))
save("gguf", "overlap", gguf([arch], [tensor("a", [16], 0, 0), tensor("b", [1], 0, 32)], bytes(64)))
save("gguf", "out-of-bounds", gguf([arch], [tensor("a", [16], 0, 1 << 40)], bytes(64)))
save("gguf", "overflow", gguf([arch], [tensor("a", [1 << 32, 1 << 32, 1 << 32], 0, 0)], bytes(64)))
save("gguf", "unaligned", gguf([arch], [tensor("a", [1], 0, 4)], bytes(64)))
save("gguf", "twice", gguf([arch, arch], [], b""))
deep = array(0, [])
for _ in range(40):
    deep = array(9, [deep])
save("gguf", "deep", gguf([pair("k", 9, deep)], [], b""))
save("gguf", "type-iq2", gguf([arch], [tensor("a", [256], 16, 0)], bytes(96)))
save("gguf", "big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0))


def safetensors(header: object, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


save("safetensors", "sound", safetensors(
    {"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [1], 24, 26),
     "n": entry("F32", [0, 4], 26, 26), "ids": entry("I64", [1], 26, 34)}, bytes(34)))
save("safetensors", "gap", safetensors({"a": entry("F32", [1], 4, 8)}, bytes(8)))
save("safetensors", "overlap", safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F16", [1], 2, 4)}, bytes(4)))
save("safetensors", "short", safetensors({"a": entry("F32", [2], 0, 4)}, bytes(4)))
save("safetensors", "overflow", safetensors({"a": entry("F32", [1 << 62, 1 << 62], 0, 4)}, bytes(4)))
save("safetensors", "twice", safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry("F32", [0], 0, 0)).encode(),) * 2), b""))
save("safetensors", "deep", safetensors(b'{"a":' + b"[" * 300, b""))
save("safetensors", "dims", safetensors({"a": entry("F32", [1] * 40, 0, 4)}, bytes(4)))

llama = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "eos_token_id": [1, 2], "rope_scaling": {"rope_type": "llama3", "type": "llama3", "factor": 8.0},
}
save("hf_config", "sound", json.dumps(llama).encode())
save("hf_config", "heads", json.dumps(llama | {"num_key_value_heads": 3}).encode())
save("hf_config", "zero", json.dumps(llama | {"num_attention_heads": 0}).encode())
save("hf_config", "huge", json.dumps(llama | {"hidden_size": 1 << 60}).encode())
save("hf_config", "nested", json.dumps(
    {k: v for k, v in llama.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 1e6}}).encode())
save("hf_config", "tokens", json.dumps(
    {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None,
     "chat_template": [{"name": "default", "template": "{{ messages }}"}]}).encode())

save("jsonl", "sound", b'\xef\xbb\xbf{"a": 1}\r\n\n[2]\n"x"')
save("jsonl", "broken", b'{"a" 1}\n{"b": 2}\n{\n')
save("jsonl", "not-utf8", b'"\xff"\n')
save("jsonl", "deep", b"[" * 1000 + b"\n")
save("jsonl", "long", b"1" * 5000 + b"\n1\n")

alphabet = [chr(b) for b in range(33, 127)] + ["Ġ", "Ċ", "Ã", "©", "Ġa"]
tokenizer = {
    "added_tokens": [{"id": len(alphabet), "content": "<|im_end|>", "special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\s+(?!\S)|\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(alphabet)}, "merges": ["Ġ a"]},
}
save("tokenizer_json", "sound", json.dumps(tokenizer).encode())
save("tokenizer_json", "huge-id", json.dumps(tokenizer | {"added_tokens": [{"id": 4294967295, "content": "x"}]}).encode())
save("tokenizer_json", "backtracks", json.dumps(tokenizer).replace(r"\\s+(?!", r"(\\S+)+(?!").encode())
save("tokenizer_json", "deep", b'{"pre_tokenizer":' + b'{"type":"Sequence","pretokenizers":[' * 200)

pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "it", "na", "##ive", "##i", "e", "12", ",", "345", "日", "x"]
wordpiece = {
    "added_tokens": [{"id": i, "content": t, "special": True} for i, t in enumerate(pieces[:4])],
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
    "model": {"type": "WordPiece", "vocab": {t: i for i, t in enumerate(pieces)}, "unk_token": "[UNK]",
              "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
}
save("tokenizer_json", "wordpiece", json.dumps(wordpiece).encode())
save("tokenizer_json", "wordpiece-no-unk", json.dumps(wordpiece).replace('"[UNK]": 1, ', "").encode())
save("tokenizer_json", "wordpiece-prefix", json.dumps(wordpiece).replace('"##"', '"%s"' % ("#" * 5000)).encode())

save("chat_template", "sound", b"{%- for m in messages %}\n  {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
     b"{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
save("chat_template", "endless", b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
save("chat_template", "recursive", b"{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}")
save("chat_template", "loud", b"{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}")
save("chat_template", "half-tag", b"{%}}")
save("chat_template", "generation", b"{%- generation -%}{{ messages[-1].content | tojson(indent=2) }}{%+ endgeneration %}<|im_end|>")

save("json_schema", "sound", json.dumps(
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"$ref": "#"}}, "required": ["a"]}).encode())
save("json_schema", "itself", b'{"allOf":[{"$ref":"#"}]}')
save("json_schema", "square", json.dumps({"type": "array", "minItems": 10000, "items": {"type": "string", "minLength": 10000}}).encode())
save("json_schema", "typo", b'{"typ":"object"}')
save("regex", "cube", b"((a{1,99}){1,99}){1,99}")
save("regex", "look-ahead", b"a(?=b)")
save("regex", "states", b"(.*a){30}")
save("lark", "sound", b'start: "(" start ")" | NUM\nNUM: /[0-9]+/')
save("lark", "ambiguous", b'start: start start | "a" |')
