"""Three hundred JSON schemas of rising difficulty: every answer is valid, cut and told so, or the schema is refused.

    python openai_schemas.py BASE_URL MODEL      (BASE_URL ends in /v1)

The answers are judged by the `jsonschema` package, not by the server's own idea of validity. At temperature 1 the model
tries everything that the constraint leaves open. Exits with 1 if an answer is wrong or too many schemas are refused.
"""

import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
N_SCHEMAS = 300
client = openai.OpenAI(
    base_url=BASE_URL, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=20, timeout=300
)


def string(rng):
    kind = rng.randrange(6)
    if kind == 0:
        return {"type": "string", "minLength": 1, "maxLength": rng.choice([1, 4, 12])}
    if kind == 1:
        return {"type": "string", "maxLength": rng.choice([2000, 5000])}
    if kind == 2:
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,4}$", "^(yes|no)$", "^[A-Z][0-9]{3}-x?$", "^a+b$"])}
    if kind == 3:
        return {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])}
    if kind == 4:
        return {"enum": rng.sample(["a", "b c", 'q"q', "é", "\\n", ""], 3)}
    return {"const": rng.choice(["x", 7, None, True, [1, 2]])}


def number(rng):
    low = rng.randrange(-50, 50)
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 200)}
    if kind == 1:
        return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 9}
    if kind == 2:
        return {"type": "number", "minimum": low, "maximum": low + 1.5}
    return {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": rng.choice([2, 5, 25])}


def schema(rng, depth):
    kind = rng.randrange(8) if depth > 0 else rng.randrange(3)
    if kind == 0:
        return string(rng)
    if kind == 1:
        return number(rng)
    if kind == 2:
        return {"type": rng.choice(["boolean", "null"])}
    if kind == 3:
        return {"type": "array", "items": schema(rng, depth - 1), "minItems": rng.randrange(2), "maxItems": 3}
    if kind == 4:
        return {"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}
    if kind == 5:
        first = {"type": "array", "prefixItems": [schema(rng, 0), schema(rng, 0)], "minItems": 2, "maxItems": 2}
        return first | {"items": False}
    names = rng.sample(["name", "a b", "é", "x-1", "id", "n"], rng.randrange(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: schema(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def whole(n):
    """Schema number `n`: an object, whose members get deeper with `n`; every tenth one is recursive."""
    rng = random.Random(n)
    body = {"type": "object", "properties": {"v": schema(rng, 1 + n // 75)}, "required": ["v"]}
    body["additionalProperties"] = False
    if n % 10 == 9:
        tree = {"leaf": schema(rng, 0), "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}
        body["$defs"] = {
            "tree": {"type": "object", "properties": tree, "required": ["leaf"], "additionalProperties": False}
        }
        body["properties"]["v"] = {"$ref": "#/$defs/tree"}
    return body


def ask(n):
    body = whole(n)
    try:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Answer."}],
            response_format={"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": body}},
            temperature=1,
            seed=n,
            max_tokens=250,
        )
    except openai.BadRequestError as error:
        assert error.code == "unsupported_constraint", error
        return "refused", error.message
    (choice,) = answer.choices
    if choice.finish_reason == "length":
        return "cut", ""
    assert choice.finish_reason == "stop", choice
    try:
        jsonschema.Draft202012Validator(body).validate(json.loads(choice.message.content))
    except (ValueError, jsonschema.ValidationError) as error:
        return "wrong", f"{json.dumps(body)}\n  {choice.message.content}\n  {str(error).splitlines()[0]}"
    return "valid", ""


def main():
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(N_SCHEMAS)))
    counts = {kind: sum(found == kind for found, _ in results) for kind in ("valid", "cut", "refused", "wrong")}
    for n, (found, why) in enumerate(results):
        if found in ("wrong", "refused"):
            print(f"{found}: schema {n}: {why}")
    print(", ".join(f"{n} {kind}" for kind, n in counts.items()))
    sys.exit(1 if counts["wrong"] or counts["refused"] > N_SCHEMAS // 20 or counts["valid"] < N_SCHEMAS // 2 else 0)


main()
