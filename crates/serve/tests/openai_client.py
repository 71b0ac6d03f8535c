"""The official `openai` client against a running server.

    python openai_client.py BASE_URL MODEL      (BASE_URL ends in /v1)

Prints a line for each failure and "N passed, M failed"; exits with 1 if any failed. Works with any
model, however small: what is checked is the protocol, not the answers. `OPENAI_API_KEY` is sent if set.
"""

import json
import math
import os
import sys
import traceback
from typing import Literal

import openai
from pydantic import BaseModel

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
client = openai.OpenAI(
    base_url=BASE_URL, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0, timeout=300
)
HI = [{"role": "user", "content": "Say hello."}]
CHECKS = []


def check(f):
    CHECKS.append(f)
    return f


def create(**kwargs):
    return client.chat.completions.create(**{"model": MODEL, "messages": HI, "max_tokens": 8} | kwargs)


def refused(kind, **kwargs):
    """The error that a request must end with."""
    try:
        create(**kwargs)
    except openai.APIStatusError as error:
        assert type(error) is kind, f"{type(error).__name__}: {error}"
        assert error.request_id and error.request_id.startswith("req_"), error.request_id
        assert error.type and error.code, error
        return error
    raise AssertionError("the request was not refused")


def text(answer, choice=0):
    return answer.choices[choice].message.content


@check
def models_list():
    page = client.models.list()
    assert page.object == "list"
    assert MODEL in [model.id for model in page.data]
    assert all(model.object == "model" and model.owned_by for model in page.data)


@check
def models_retrieve():
    model = client.models.retrieve(MODEL)
    assert (model.id, model.object) == (MODEL, "model") and isinstance(model.created, int)


@check
def models_retrieve_unknown():
    try:
        client.models.retrieve("no-such-model")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and error.request_id, error
    else:
        raise AssertionError("it was found")


@check
def create_whole():
    answer = create(temperature=0)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer.model == MODEL and answer.created > 0 and answer._request_id
    (choice,) = answer.choices
    assert choice.index == 0 and choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert choice.logprobs is None and choice.message.refusal is None
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 1 <= usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@check
def content_parts_are_text():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    assert text(create(messages=parts, temperature=0)) == text(create(temperature=0))


@check
def stream_is_whole():
    whole = create(temperature=0)
    chunks = list(create(temperature=0, stream=True))
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text(whole)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@check
def stream_with_usage():
    whole = create(temperature=0)
    chunks = list(create(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, field) == getattr(whole.usage, field), field


@check
def stream_helper():
    # The helper raises on an answer that is cut off, so this one is sure to end.
    choices = {"max_tokens": 20, "temperature": 0, "extra_body": {"guided_choice": ["yes", "no"]}}
    with client.chat.completions.stream(model=MODEL, messages=HI, **choices) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert deltas == text(final) == text(create(**choices))


@check
def two_choices():
    answer = create(n=2, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    streamed = {0: "", 1: ""}
    for chunk in create(n=2, temperature=1, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == {0: text(answer, 0), 1: text(answer, 1)}


@check
def seeds_repeat():
    first = create(seed=11, temperature=1, max_tokens=24)
    again = create(seed=11, temperature=1, max_tokens=24)
    assert text(first) == text(again) and first.system_fingerprint == again.system_fingerprint


@check
def greedy_repeats():
    assert len({text(create(temperature=0, max_tokens=24)) for _ in range(3)}) == 1


@check
def stop_strings():
    whole = text(create(temperature=0, max_tokens=24))
    if len(whole) < 3:
        return
    stop = whole[len(whole) // 2 :][:2]
    answer = create(temperature=0, max_tokens=24, stop=[stop])
    assert text(answer) == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    chunks = create(temperature=0, max_tokens=24, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text(answer)


@check
def logprobs():
    answer = create(temperature=0, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == text(answer)
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0 and abs(token.logprob - token.top_logprobs[0].logprob) < 1e-6
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-4


@check
def max_completion_tokens():
    answer = create(max_tokens=openai.omit, max_completion_tokens=1, temperature=0)
    assert answer.usage.completion_tokens == 1


class Topic(BaseModel):
    topic: Literal["money", "weather", "food"]
    sure: bool


@check
def parse_with_a_schema():
    answer = client.chat.completions.parse(
        model=MODEL, messages=HI, max_tokens=100, temperature=1, seed=3, response_format=Topic
    )
    assert isinstance(answer.choices[0].message.parsed, Topic)


@check
def stream_with_a_schema():
    with client.chat.completions.stream(
        model=MODEL, messages=HI, max_tokens=100, temperature=1, seed=4, response_format=Topic
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Topic)


@check
def json_object():
    answer = create(max_tokens=60, temperature=0, response_format={"type": "json_object"})
    assert text(answer).lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text(answer)), dict)


@check
def guided_choice():
    answer = create(max_tokens=20, extra_body={"guided_choice": ["yes", "no"]})
    assert text(answer) in ("yes", "no")


@check
def hints_are_accepted():
    create(user="u", metadata={"k": "v"}, store=False, service_tier="auto", safety_identifier="s")


@check
def raw_response_has_a_request_id():
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI, max_tokens=1)
    assert raw.headers["x-request-id"].startswith("req_") and raw.parse().choices


@check
def unknown_field():
    error = refused(openai.BadRequestError, extra_body={"colour": "blue"})
    assert error.param == "colour" and "colour" in error.message, error


@check
def unsupported_field():
    assert refused(openai.BadRequestError, store=True).param == "store"


@check
def wrong_value():
    assert refused(openai.BadRequestError, temperature=9).param == "temperature"


@check
def unsupported_schema():
    schema = {"name": "x", "schema": {"type": "no such type"}}
    error = refused(openai.BadRequestError, response_format={"type": "json_schema", "json_schema": schema})
    assert error.param.startswith("response_format"), error


@check
def unknown_model():
    assert refused(openai.NotFoundError, model="no-such-model").code == "model_not_found"


@check
def context_overflow():
    long = [{"role": "user", "content": "hello world " * 50_000}]
    assert refused(openai.BadRequestError, messages=long).code == "context_length_exceeded"
    assert refused(openai.BadRequestError, max_tokens=10_000_000).code == "context_length_exceeded"


@check
def unknown_address():
    try:
        client.post("/no/such/address", cast_to=object, body={})
    except openai.NotFoundError as error:
        assert error.request_id and error.code, error
    else:
        raise AssertionError("it was found")


def main():
    n_failed = 0
    for f in CHECKS:
        try:
            f()
        except Exception as error:
            n_failed += 1
            line = traceback.extract_tb(error.__traceback__)[-1]
            print(f"FAILED {f.__name__}: {type(error).__name__}: {error} ({line.name}, line {line.lineno})")
    print(f"{len(CHECKS) - n_failed} passed, {n_failed} failed")
    sys.exit(1 if n_failed else 0)


main()
