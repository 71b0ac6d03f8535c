"""The single-turn categories of the Berkeley Function Calling Leaderboard, against a running server.

    python bfcl.py rows DATA OUT [N]               writes up to N rows of the train half as chat rows with tools
    python bfcl.py ask DATA BASE_URL MODEL [N]     asks up to N questions of the test half; prints one JSON object

DATA is the folder of BFCL's files with `split.tsv`. Where a call is expected one is demanded (`tool_choice: required`);
where none fits, and for `live_relevance`, the model chooses. An answer is valid if each of its calls names a tool of the
request with arguments that the `jsonschema` package accepts. The score is BFCL's: the right functions, every required
argument, every value among those allowed; no call where none fits.
"""

import csv
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

NO_CALL = ("irrelevance", "live_irrelevance")
TYPES = {"dict": "object", "float": "number", "tuple": "array", "double": "number", "long": "integer", "bool": "boolean"}


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def read(data, half):
    """The rows of a half, as (category, row, ground truth or None), in the split's order."""
    with open(os.path.join(data, "split.tsv")) as file:
        wanted = [(row["category"], row["id"]) for row in csv.DictReader(file, delimiter="\t") if row["split"] == half]
    rows, truths = {}, {}
    for category in {category for category, _ in wanted}:
        rows |= {row["id"]: row for row in lines(os.path.join(data, f"BFCL_v4_{category}.json"))}
        answers = os.path.join(data, "possible_answer", f"BFCL_v4_{category}.json")
        if os.path.exists(answers):
            truths |= {row["id"]: row["ground_truth"] for row in lines(answers)}
    return [(category, rows[name], truths.get(name)) for category, name in wanted]


def spread(rows, n):
    """`n` of them from all over."""
    return rows if n >= len(rows) else [rows[i * len(rows) // n] for i in range(n)]


def schema(given):
    """A parameter as a JSON schema: BFCL writes Python's types."""
    if isinstance(given, list):
        return [schema(item) for item in given]
    if not isinstance(given, dict):
        return given
    out = {}
    for key, value in given.items():
        if key == "type" and isinstance(value, str):
            if value != "any":
                out[key] = TYPES.get(value.lower(), value.lower())
        elif key == "properties" and isinstance(value, dict):
            out[key] = {name: schema(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            out[key] = schema(value)
        elif key in ("description", "enum", "required", "minimum", "maximum") and value is not None:
            out[key] = value
    return out


def name_of(function):
    """OpenAI's names have no dots."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", function)[:64]


def tools_of(row):
    named = {name_of(f["name"]): f for f in row["function"]}
    return [
        {
            "type": "function",
            "function": {"name": name, "description": f["description"], "parameters": schema(f["parameters"])},
        }
        for name, f in named.items()
    ]


def plain(allowed):
    """One of the values allowed."""
    if isinstance(allowed, dict):
        return {key: plain(first(values)) for key, values in allowed.items() if "" not in values}
    if isinstance(allowed, list):
        return [plain(item) for item in allowed]
    return allowed


def first(values):
    return next(iter(values), None)


def training_row(category, row, truth):
    messages = list(row["question"][0])
    if category in NO_CALL:
        messages.append({"role": "assistant", "content": "None of the functions can do that."})
    elif truth is None:
        return None
    else:
        calls = []
        for n, call in enumerate(truth):
            ((function, arguments),) = call.items()
            given = {key: plain(first(values)) for key, values in arguments.items() if "" not in values}
            function = {"name": name_of(function), "arguments": json.dumps(given, ensure_ascii=False)}
            calls.append({"id": f"call_{n}", "type": "function", "function": function})
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
    return {"messages": messages, "tools": tools_of(row)}


def words(text):
    return re.sub(r"[ ,./\-_*^()]", "", text).lower().replace("'", '"')


def same(value, allowed):
    """Is a value the one allowed? Numbers by value, strings by their letters."""
    if isinstance(value, str) and isinstance(allowed, str):
        return words(value) == words(allowed)
    if isinstance(value, bool) or isinstance(allowed, bool):
        return value is allowed
    if isinstance(value, list) and isinstance(allowed, list):
        return len(value) == len(allowed) and all(map(same, value, allowed))
    if isinstance(value, dict) and isinstance(allowed, dict):
        known = all(key in allowed and any(same(v, a) for a in allowed[key]) for key, v in value.items())
        return known and all(key in value or "" in values for key, values in allowed.items())
    return value == allowed


def call_matches(call, expected, required):
    ((function, arguments),) = expected.items()
    if call[0] != name_of(function) or any(key not in call[1] for key in required.get(name_of(function), [])):
        return False
    return same(call[1], arguments)


def calls_match(calls, truth, row):
    """Every expected call once, in any order."""
    required = {name_of(f["name"]): f["parameters"].get("required", []) for f in row["function"]}
    left = list(calls)
    for expected in truth:
        found = next((call for call in left if call_matches(call, expected, required)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def ask(client, model, category, row, truth):
    import jsonschema
    import openai

    tools = tools_of(row)
    choice = "auto" if category in NO_CALL or truth is None else "required"
    try:
        answer = client.chat.completions.create(
            model=model, messages=row["question"][0], tools=tools, tool_choice=choice, temperature=0, max_tokens=512
        )
    except openai.BadRequestError as error:
        return "refused", False, f"{error.code}: {error.message}"
    (choice,) = answer.choices
    if choice.finish_reason == "length":
        return "cut", False, ""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    calls = []
    for call in choice.message.tool_calls or []:
        try:
            arguments = json.loads(call.function.arguments)
            jsonschema.Draft202012Validator(schemas[call.function.name]).validate(arguments)
        except (ValueError, KeyError, jsonschema.ValidationError) as error:
            return "invalid", False, f"{call.function.name}({call.function.arguments}): {error}"
        calls.append((call.function.name, arguments))
    if truth is not None and not calls:
        return "invalid", False, "a call was demanded and none came"
    if category in NO_CALL:
        right = not calls
    elif truth is None:
        right = bool(calls)
    else:
        right = calls_match(calls, truth, row)
    return "valid", right, ""


def main():
    verb, data = sys.argv[1:3]
    if verb == "rows":
        n = int(sys.argv[4]) if len(sys.argv) > 4 else 10**9
        rows = [training_row(*row) for row in read(data, "train")]
        rows = spread([row for row in rows if row], n)
        with open(sys.argv[3], "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(json.dumps({"rows": len(rows)}))
        return
    import openai

    base_url, model = sys.argv[3:5]
    n = int(sys.argv[5]) if len(sys.argv) > 5 else 10**9
    rows = spread(read(data, "test"), n)
    client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=600, max_retries=20)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: ask(client, model, *row), rows))
    kinds = {kind: sum(k == kind for k, _, _ in found) for kind in ("valid", "cut", "refused", "invalid")}
    scores = {}
    for (category, _, _), (_, right, _) in zip(rows, found):
        scores.setdefault(category, []).append(right)
    for (category, row, _), (kind, _, why) in zip(rows, found):
        if kind in ("invalid", "refused"):
            print(f"{kind}: {row['id']}: {why[:500]}", file=sys.stderr)
    shown = {category: [sum(all_), len(all_)] for category, all_ in sorted(scores.items())}
    right = sum(right for _, right, _ in found)
    print(json.dumps({"rows": len(rows), "right": right, "kinds": kinds, "categories": shown}))


main()
