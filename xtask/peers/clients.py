"""litellm, langchain-openai and lm-evaluation-harness against a running server, told nothing but its address.

    python clients.py BASE_URL MODEL WORK

BASE_URL ends in /v1; WORK is an empty folder. The harness asks the server itself how prompts are cut into tokens. Prints one JSON object: what passed, and why what failed did.
"""

import json
import math
import os
import subprocess
import sys
import traceback
import urllib.request

BASE_URL, MODEL, WORK = sys.argv[1:4]
os.environ.setdefault("OPENAI_API_KEY", "none")
HI = [{"role": "user", "content": "Say hello."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CHECKS = []


def check(f):
    CHECKS.append(f)
    return f


@check
def litellm_whole_and_streamed():
    import litellm

    common = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "messages": HI, "max_tokens": 16, "temperature": 0}
    whole = litellm.completion(**common)
    assert whole.usage.completion_tokens > 0
    chunks = litellm.completion(stream=True, **common)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content, (text, whole)


@check
def litellm_tools_and_embeddings():
    import litellm

    answer = litellm.completion(
        model=f"openai/{MODEL}", api_base=BASE_URL, messages=HI, tools=[TOOL], tool_choice="required", max_tokens=60
    )
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    vectors = litellm.embedding(model=f"openai/{MODEL}", api_base=BASE_URL, input=["a card", "a bank"])
    assert len(vectors.data) == 2 and len(vectors.data[0]["embedding"]) > 8


@check
def litellm_errors():
    import litellm

    try:
        litellm.completion(model="openai/none", api_base=BASE_URL, messages=HI, max_retries=0)
    except litellm.NotFoundError:
        return
    raise AssertionError("a model that does not exist answered")


@check
def langchain_invoke_and_stream():
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=BASE_URL, temperature=0, max_tokens=16)
    whole = chat.invoke("Say hello.")
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(part.content for part in chat.stream("Say hello.")) == whole.content
    assert len(chat.batch(["Say hello."] * 4)) == 4


@check
def langchain_tools_and_structures():
    from typing import Literal

    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Topic(BaseModel):
        topic: Literal["money", "food"]
        urgent: bool

    chat = ChatOpenAI(model=MODEL, base_url=BASE_URL, temperature=0, max_tokens=60)
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Topic, method=method).invoke("My card is lost.")
        assert isinstance(found, Topic), (method, found)
    (call,) = chat.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke("Rome?").tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Paris", "Rome")


@check
def langchain_responses_and_embeddings():
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(model=MODEL, base_url=BASE_URL, use_responses_api=True, temperature=0, max_tokens=16)
    assert chat.invoke("Say hello.").text
    vectors = OpenAIEmbeddings(model=MODEL, base_url=BASE_URL, check_embedding_ctx_length=False)
    assert len(vectors.embed_documents(["a", "b"])) == 2


def likelihood(context, continuation):
    """The log-likelihood of a continuation, from the server's own tokens: an answer that the harness does not compute."""
    body = {"model": MODEL, "prompt": context + continuation, "max_tokens": 0, "echo": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{BASE_URL}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    logprobs = json.load(urllib.request.urlopen(request))["choices"][0]["logprobs"]
    pairs = zip(logprobs["text_offset"], logprobs["token_logprobs"])
    return sum(p for at, p in pairs if at >= len(context) and p is not None)


@check
def harness():
    rows = [
        {"q": f"The opposite of {a} is", "choices": [b, c, "table"], "gold": 0}
        for a, b, c in [
            ("hot", "cold", "blue"), ("up", "down", "left"), ("big", "small", "green"), ("day", "night", "lunch"),
            ("good", "bad", "tree"), ("open", "closed", "seven"), ("black", "white", "loud"), ("wet", "dry", "sad"),
        ]
    ]
    data = os.path.join(WORK, "rows.jsonl")
    with open(data, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    tasks = {
        "bantam_choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n",
        "bantam_words": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
        "metric_list:\n  - metric: byte_perplexity\n",
        "bantam_free": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[gold]}}'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n",
    }
    for name, body in tasks.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        with open(os.path.join(WORK, f"{name}.yaml"), "w") as file:
            file.write(head + body)
    arguments = (
        f"model={MODEL},base_url={BASE_URL}/completions,tokenizer_backend=remote,"
        "num_concurrent=4,max_length=2048,max_retries=1"
    )
    out = os.path.join(WORK, "out")
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", ",".join(tasks), "--include_path", WORK, "--output_path", out, "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=WORK)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [os.path.join(base, name) for base, _, names in os.walk(out) for name in names]
    results = json.load(open(next(name for name in files if os.path.basename(name).startswith("results"))))["results"]
    print("harness:", json.dumps(results), file=sys.stderr)
    samples = next(name for name in files if "samples_bantam_choice" in name)
    n_compared = 0
    for line in open(samples):
        sample = json.loads(line)
        for choice, answer in zip(sample["doc"]["choices"], sample["resps"]):
            theirs = float(answer[0][0])
            assert abs(theirs - likelihood(sample["doc"]["q"], f" {choice}")) < 1e-3, (sample["doc"], choice, theirs)
            n_compared += 1
    assert n_compared == 24
    assert math.isfinite(results["bantam_words"]["byte_perplexity,none"])


def main():
    passed, failed = [], {}
    for f in CHECKS:
        try:
            f()
            passed.append(f.__name__)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            failed[f.__name__] = f"{type(error).__name__}: {error} ({line.name}, line {line.lineno})"
            print(f"FAILED {f.__name__}: {failed[f.__name__]}", file=sys.stderr)
    print(json.dumps({"passed": passed, "failed": failed}))


main()
