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
import urllib.request
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
    create(prediction={"type": "content", "content": "Hello."}, prompt_cache_key="k")


# Tools. The model is small and its context short, so the tools are, too.

NOW = {"type": "function", "function": {"name": "now"}}
PICK = {
    "type": "function",
    "function": {
        "name": "pick",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}


def valid(call):
    arguments = json.loads(call.function.arguments)
    return arguments == {} if call.function.name == "now" else arguments["n"] in (1, 2) and len(arguments) == 1


@check
def tools_required_named_and_none():
    for seed in range(3):
        answer = create(tools=[NOW, PICK], tool_choice="required", seed=seed, temperature=1, max_tokens=200)
        (choice,) = answer.choices
        if choice.finish_reason == "tool_calls":
            assert choice.message.tool_calls and all(map(valid, choice.message.tool_calls)), answer
            assert choice.message.content is None
        named = {"type": "function", "function": {"name": "pick"}}
        answer = create(tools=[NOW, PICK], tool_choice=named, seed=seed, temperature=1, max_tokens=100)
        (call,) = answer.choices[0].message.tool_calls
        assert call.id.startswith("call_") and call.function.name == "pick" and valid(call)
    assert create(tools=[NOW], tool_choice="none").choices[0].message.tool_calls is None
    create(tools=[NOW], max_tokens=4)


@check
def tools_one_at_a_time_and_their_results():
    messages = list(HI)
    answer = create(tools=[NOW], tool_choice="required", parallel_tool_calls=False, max_tokens=100)
    message = answer.choices[0].message
    assert len(message.tool_calls) == 1 and answer.choices[0].finish_reason == "tool_calls"
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}]
    assert isinstance(text(create(messages=messages, tools=[NOW], tool_choice="none")), str)


@check
def tools_streamed():
    class Pick(BaseModel):
        n: Literal[1, 2]

    tool = openai.pydantic_function_tool(Pick, name="pick")
    request = {"model": MODEL, "messages": HI, "tools": [tool], "tool_choice": "required"}
    request |= {"parallel_tool_calls": False, "max_tokens": 120, "temperature": 0}
    parsed = client.chat.completions.parse(**request).choices[0].message.tool_calls[0].function
    assert isinstance(parsed.parsed_arguments, Pick)
    with client.chat.completions.stream(**request) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert done[0].name == "pick" and done[0].parsed_arguments == parsed.parsed_arguments
    assert final.choices[0].finish_reason == "tool_calls"


@check
def custom_tools():
    grammar = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-c]{3}"}}
    tool = {"type": "custom", "custom": {"name": "code", "format": grammar}}
    answer = create(tools=[tool], tool_choice="required", max_tokens=60, temperature=1)
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "custom" and call.custom.name == "code"
    assert len(call.custom.input) == 3 and set(call.custom.input) <= set("abc")


@check
def a_tool_that_is_not_there():
    named = {"type": "function", "function": {"name": "nope"}}
    assert refused(openai.BadRequestError, tools=[NOW], tool_choice=named).param == "tool_choice"


@check
def parse_that_is_cut_off_raises():
    try:
        client.chat.completions.parse(model=MODEL, messages=HI, max_tokens=1, response_format=Topic)
    except openai.LengthFinishReasonError:
        return
    raise AssertionError("half an answer was parsed")


@check
def asynchronous():
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=client.api_key, max_retries=0) as other:
            request = {"model": MODEL, "messages": HI, "max_tokens": 8, "temperature": 0}
            whole = await other.chat.completions.create(**request)
            stream = await other.chat.completions.create(stream=True, **request)
            return text(whole), "".join([c.choices[0].delta.content or "" async for c in stream])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed == text(create(temperature=0))


# Stored completions.


@check
def stored_completions():
    tag = f"run-{os.getpid()}"
    kept = [create(store=True, metadata={"tag": tag, "n": str(n)}, max_tokens=4) for n in range(3)]
    listed = client.chat.completions.list(metadata={"tag": tag}, limit=1)
    assert [c.id for c in listed] == [c.id for c in kept], "pages follow each other"
    found = client.chat.completions.retrieve(kept[0].id)
    assert text(found) == text(kept[0]) and found.metadata["n"] == "0"
    assert client.chat.completions.update(kept[0].id, metadata={"tag": "other"}).metadata == {"tag": "other"}
    assert len(list(client.chat.completions.list(metadata={"tag": tag}))) == 2
    (message,) = client.chat.completions.messages.list(kept[0].id)
    assert message.role == "user" and message.content == "Say hello."
    assert client.chat.completions.delete(kept[0].id).deleted
    try:
        client.chat.completions.retrieve(kept[0].id)
    except openai.NotFoundError:
        return
    raise AssertionError("it is still there")


# Text completions.


@check
def completions():
    request = {"model": MODEL, "prompt": "where is", "max_tokens": 6, "temperature": 0}
    answer = client.completions.create(**request)
    assert answer.object == "text_completion" and answer.choices[0].finish_reason in ("stop", "length")
    streamed = client.completions.create(stream=True, stream_options={"include_usage": True}, **request)
    chunks = list(streamed)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == answer.choices[0].text
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    both = client.completions.create(**request | {"prompt": ["where is", "is it"], "n": 2})
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and both.choices[0].text == answer.choices[0].text


@check
def completions_echo_logprobs():
    request = {"model": MODEL, "prompt": "where is the", "max_tokens": 0, "echo": True, "logprobs": 3}
    (choice,) = client.completions.create(**request).choices
    assert choice.text == "where is the" == "".join(choice.logprobs.tokens)
    assert choice.logprobs.token_logprobs[0] is None
    for logprob, top in zip(choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:]):
        assert logprob <= 0 and len(top) >= 3 and logprob <= max(top.values()) + 1e-6
    more = client.completions.create(**request | {"max_tokens": 1, "temperature": 0}).choices[0]
    assert len(more.logprobs.tokens) == len(choice.logprobs.tokens) + 1


# Embeddings and decisions.


@check
def embeddings():
    request = {"model": MODEL, "input": ["where is the card?", "a"]}
    by_default = client.embeddings.create(**request)
    plain = client.embeddings.create(encoding_format="float", **request)
    for one, other in zip(by_default.data, plain.data):
        assert all(abs(a - b) < 1e-6 for a, b in zip(one.embedding, other.embedding)), "base64 is the same"
        assert abs(sum(x * x for x in other.embedding) - 1) < 1e-4
    assert by_default.usage.prompt_tokens > 0 and [d.index for d in plain.data] == [0, 1]
    short = client.embeddings.create(dimensions=8, **request).data[0].embedding
    assert len(short) == 8 and abs(sum(x * x for x in short) - 1) < 1e-4
    headers = {"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json"}
    prompt = json.dumps({"model": MODEL, "prompt": "where is the card?"}).encode()
    asked = urllib.request.Request(BASE_URL.removesuffix("/v1") + "/tokenize", prompt, headers)
    tokens = json.load(urllib.request.urlopen(asked))["tokens"]
    given = client.embeddings.create(model=MODEL, input=tokens, encoding_format="float").data[0]
    assert all(abs(a - b) < 1e-6 for a, b in zip(given.embedding, plain.data[0].embedding))


@check
def decisions():
    questions = [
        {"type": "predicate", "instructions": "Is it a greeting?", "name": "greets"},
        {"type": "choice", "instructions": "Topic?", "choices": [{"value": "money"}, {"value": "food"}]},
    ]
    body = {"model": MODEL, "input": "hello", "questions": questions}
    answer = client.post("/decisions", cast_to=object, body=body)
    greets, topic = answer["answers"]
    assert greets["name"] == "greets" and 0 <= greets["probability"] <= 1
    assert topic["choice"] in ("money", "food") and abs(sum(p["probability"] for p in topic["probabilities"]) - 1) < 1e-6


# Responses.


def respond(**kwargs):
    return client.responses.create(**{"model": MODEL, "input": "Say hello.", "max_output_tokens": 8} | kwargs)


@check
def responses():
    first = respond(temperature=0, metadata={"k": "v"}, instructions="Be brief.")
    assert first.object == "response" and first.status in ("completed", "incomplete")
    assert isinstance(first.output_text, str) and first.usage.output_tokens <= 8
    found = client.responses.retrieve(first.id)
    assert found.output_text == first.output_text and found.metadata == {"k": "v"}
    second = respond(previous_response_id=first.id, input="And?")
    assert second.previous_response_id == first.id and second.usage.input_tokens > 0
    (item,) = client.responses.input_items.list(first.id)
    assert item.role == "user"
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        return
    raise AssertionError("it is still there")


@check
def responses_streamed():
    whole = respond(temperature=0)
    events = list(respond(temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text


@check
def responses_tools_and_formats():
    tool = {"type": "function", "strict": True} | PICK["function"]
    answer = respond(tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=100)
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments)["n"] in (1, 2)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "good"}
    respond(previous_response_id=answer.id, input=[result])
    parsed = client.responses.parse(model=MODEL, input="Say hello.", text_format=Topic, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Topic)
    with client.responses.stream(model=MODEL, input="Say hello.", text_format=Topic, max_output_tokens=100) as s:
        assert isinstance(s.get_final_response().output_parsed, Topic)


@check
def responses_in_the_background():
    import time

    whole = respond(temperature=0)
    queued = respond(temperature=0, background=True)
    assert queued.status == "queued" and queued.background and queued.output == []
    for _ in range(600):
        found = client.responses.retrieve(queued.id)
        if found.status not in ("queued", "in_progress"):
            break
        time.sleep(0.05)
    assert found.status == whole.status and found.output_text == whole.output_text
    assert client.responses.cancel(queued.id).status == found.status, "it has ended and stays as it is"
    long = respond(background=True, max_output_tokens=100)
    assert client.responses.cancel(long.id).status in ("cancelled", "completed", "incomplete")
    try:
        client.responses.cancel(whole.id)
    except openai.BadRequestError as error:
        assert error.code == "not_cancellable"
    else:
        raise AssertionError("one that was waited for was cancelled")


# Files and batches.


@check
def files():
    content = b"x" * 2_000_000 + b"\xff\n"
    file = client.files.create(file=("data.bin", content), purpose="user_data")
    assert file.bytes == len(content) and file.filename == "data.bin" and file.status == "processed"
    assert client.files.content(file.id).read() == content
    assert client.files.retrieve(file.id).id == file.id
    others = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data") for n in range(2)]
    ids = {f.id for f in client.files.list(purpose="user_data", limit=1)}
    assert {file.id, others[0].id, others[1].id} <= ids, "pages follow each other"
    soon = client.files.create(
        file=("a", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert soon.expires_at == soon.created_at + 3600
    assert client.files.delete(file.id).deleted


@check
def bad_lines():
    row = json.dumps({"messages": HI + [{"role": "assistant", "content": "Hello."}]})
    try:
        client.files.create(file=("rows.jsonl", f"{row}\n{{\n{row}\n".encode()), purpose="fine-tune")
    except openai.BadRequestError as error:
        assert error.code == "invalid_file" and "line 2" in error.message and "line 3" not in error.message, error
    else:
        raise AssertionError("a file with a bad line was taken")
    file = client.files.create(file=("rows.jsonl", f"{row}\n{row}\n".encode()), purpose="fine-tune")
    assert file.status == "processed" and client.files.wait_for_processing(file.id).id == file.id


@check
def uploads():
    import hashlib

    content = b"a" * 100_000 + b"b" * 100_000
    upload = client.uploads.create(
        bytes=len(content), filename="big.bin", mime_type="application/octet-stream", purpose="user_data"
    )
    assert upload.status == "pending" and upload.expires_at > upload.created_at
    second = client.uploads.parts.create(upload.id, data=content[100_000:])
    first = client.uploads.parts.create(upload.id, data=content[:100_000])
    assert first.object == "upload.part" and first.upload_id == upload.id
    md5 = hashlib.md5(content).hexdigest()
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=md5)
    assert done.status == "completed" and done.file.bytes == len(content) and done.file.filename == "big.bin"
    assert client.files.content(done.file.id).read() == content
    chunked = client.uploads.upload_file_chunked(
        file=content, filename="c.bin", bytes=len(content), mime_type="text/plain", purpose="user_data", part_size=70_000
    )
    assert client.files.content(chunked.file.id).read() == content
    other = client.uploads.create(bytes=3, filename="x", mime_type="text/plain", purpose="user_data")
    assert client.uploads.cancel(other.id).status == "cancelled"
    try:
        client.uploads.parts.create(other.id, data=b"abc")
    except openai.BadRequestError as error:
        assert error.code == "upload_ended"
    else:
        raise AssertionError("a cancelled upload took a part")


@check
def batches():
    import time

    body = {"model": MODEL, "messages": HI, "max_tokens": 4, "temperature": 0}
    lines = [{"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    lines.append(lines[0] | {"custom_id": "bad", "body": body | {"colour": 1}})
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"k": "v"}
    )
    for _ in range(600):
        batch = client.batches.retrieve(batch.id)
        if batch.status not in ("validating", "in_progress", "finalizing"):
            break
        time.sleep(0.1)
    assert batch.status == "completed", batch
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
    output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in output] == ["r0", "r1", "r2"]
    message = output[0]["response"]["body"]["choices"][0]["message"]["content"]
    assert message == text(create(max_tokens=4, temperature=0))
    errors = client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(errors[0])["response"]["status_code"] == 400
    assert batch.id in [b.id for b in client.batches.list(limit=1)]
    try:
        client.batches.cancel(batch.id)
    except openai.BadRequestError:
        return
    raise AssertionError("a finished batch was cancelled")


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
    assert refused(openai.BadRequestError, reasoning_effort="high").param == "reasoning_effort"


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
def keys_and_limits():
    limited = os.environ.get("BANTAM_LIMITED_KEY")
    if not limited:
        return
    request = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    try:
        client.with_options(api_key="bt-0-0").completions.create(**request)
        raise AssertionError("a wrong key opened the server")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key"
    try:
        client.with_options(api_key=os.environ["BANTAM_TRAIN_KEY"]).completions.create(**request)
        raise AssertionError("a key without the scope asked a model")
    except openai.PermissionDeniedError as error:
        assert error.code == "insufficient_scope"
    # Sixty requests a minute: the next one is refused with a time, and a client that waits it out succeeds.
    hasty = client.with_options(api_key=limited)
    try:
        for _ in range(61):
            raw = hasty.completions.with_raw_response.create(**request)
            assert raw.headers["x-ratelimit-limit-requests"] == "60"
        raise AssertionError("there was no limit")
    except openai.RateLimitError as error:
        assert error.code == "rate_limit_exceeded" and int(error.response.headers["retry-after-ms"]) <= 1000
    hasty.with_options(max_retries=3).completions.create(**request)


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
