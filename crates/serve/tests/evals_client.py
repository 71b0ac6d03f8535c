"""Evals and graders by the official `openai` client, as OpenAI's guides do it.

    python evals_client.py BASE_URL MODEL      (BASE_URL ends in /v1)

Makes an eval with a schema and graders, runs it on rows given inline, on a file, and on kept completions, reads counts
and output items, compares two runs, tries graders alone, and deletes everything again. Only `base_url` is Bantam's.
"""

import io
import json
import os
import sys
import time

import openai

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
client = openai.OpenAI(
    base_url=BASE_URL, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=2, timeout=300
)


def ended(run):
    deadline = time.time() + 300
    while run.status in ("queued", "in_progress"):
        assert time.time() < deadline, run
        time.sleep(0.1)
        run = client.evals.runs.retrieve(run.id, eval_id=run.eval_id)
    return run


evaluation = client.evals.create(
    name="IT ticket categories",
    data_source_config={
        "type": "custom",
        "item_schema": {
            "type": "object",
            "properties": {"ticket_text": {"type": "string"}, "correct_label": {"type": "string"}},
            "required": ["ticket_text", "correct_label"],
        },
        "include_sample_schema": True,
    },
    testing_criteria=[
        {
            "type": "string_check",
            "name": "Match output to human label",
            "input": "{{ sample.output_text }}",
            "operation": "eq",
            "reference": "{{ item.correct_label }}",
        },
        {
            "type": "text_similarity",
            "name": "Near the label",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.correct_label }}",
            "evaluation_metric": "fuzzy_match",
            "pass_threshold": 0.5,
        },
    ],
    metadata={"team": "support"},
)
assert evaluation.object == "eval" and evaluation.id.startswith("eval_"), evaluation
assert evaluation.data_source_config.type == "custom"
assert evaluation.data_source_config.schema_["properties"]["item"]["properties"]["ticket_text"]
assert evaluation.testing_criteria[0].operation == "eq"

# Rows in a file, the model asked through a template.
rows = [
    {"item": {"ticket_text": text, "correct_label": label}}
    for text, label in [
        ("My monitor won't turn on!", "Hardware"),
        ("I'm in vim and I can't quit!", "Software"),
        ("Best restaurants in Cleveland?", "Other"),
    ]
]
file = client.files.create(
    file=("tickets.jsonl", io.BytesIO("\n".join(map(json.dumps, rows)).encode())), purpose="evals"
)
run = client.evals.runs.create(
    evaluation.id,
    name="Categorization text run",
    data_source={
        "type": "completions",
        "model": MODEL,
        "input_messages": {
            "type": "template",
            "template": [
                {"role": "developer", "content": "Categorize the ticket: Hardware, Software, or Other."},
                {"role": "user", "content": "{{ item.ticket_text }}"},
            ],
        },
        "source": {"type": "file_id", "id": file.id},
        "sampling_params": {"temperature": 0, "max_completion_tokens": 8, "seed": 1},
    },
)
assert run.object == "eval.run" and run.status in ("queued", "in_progress"), run
run = ended(run)
assert run.status == "completed", run
assert run.result_counts.total == 3 and run.result_counts.errored == 0, run
assert run.per_model_usage[0].run_model_name == MODEL and run.per_model_usage[0].invocation_count == 3
assert [r.testing_criteria for r in run.per_testing_criteria_results] == [
    "Match output to human label",
    "Near the label",
]
# Beyond OpenAI: what the counts are worth.
statistics = run.model_extra["statistics"]
interval = statistics["pass_rate"]["interval"]
assert 0 <= interval["lo"] <= statistics["pass_rate"]["mean"] <= interval["hi"] <= 1, statistics
assert statistics["latency_ms"]["p95"] > 0

items = list(client.evals.runs.output_items.list(run.id, eval_id=evaluation.id, limit=2))
assert len(items) == 3, "pages follow one another"
assert items[0].sample.input[0].role == "developer" and items[0].sample.output[0].role == "assistant"
assert items[0].results[0].name == "Match output to human label"
again = client.evals.runs.output_items.retrieve(items[1].id, eval_id=evaluation.id, run_id=run.id)
assert again.to_dict() == items[1].to_dict()

# Answers that were brought along; a second run over the same rows is compared with the first.
answers = ["Hardware", "Software", "Hardware"]
brought = [dict(row, sample={"output_text": answer}) for row, answer in zip(rows, answers)]
second = ended(
    client.evals.runs.create(
        evaluation.id,
        data_source={"type": "jsonl", "source": {"type": "file_content", "content": brought}},
    )
)
assert (second.result_counts.passed, second.result_counts.failed) == (2, 1), second
failed = client.evals.runs.output_items.list(second.id, eval_id=evaluation.id, status="fail").data
assert [item.datasource_item["correct_label"] for item in failed] == ["Other"]
compared = client.evals.runs.retrieve(second.id, eval_id=evaluation.id, extra_query={"compare_to": run.id})
difference = compared.model_extra["comparison"]["pass_rate"]
assert difference["n"] == 3 and difference["verdict"] in ("better", "undecided"), difference

# Completions that were kept.
for _ in range(2):
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=4,
        store=True,
        metadata={"usecase": "greeting"},
    )
logs = client.evals.create(
    name="logs",
    data_source_config={"type": "stored_completions", "metadata": {"usecase": "greeting"}},
    testing_criteria=[
        {"type": "string_check", "name": "says something", "input": "{{sample.output_text}}", "operation": "ne", "reference": ""}
    ],
)
kept = ended(
    client.evals.runs.create(
        logs.id, data_source={"type": "completions", "source": {"type": "stored_completions", "limit": 10}}
    )
)
assert kept.status == "completed" and kept.result_counts.total == 2, kept

# A model that judges, and a grader alone.
grader = {
    "type": "label_model",
    "name": "tone",
    "model": MODEL,
    "input": [{"role": "user", "content": "Is this friendly? {{ sample.output_text }}"}],
    "labels": ["friendly", "unfriendly"],
    "passing_labels": ["friendly"],
}
assert client.fine_tuning.alpha.graders.validate(grader={
    "type": "string_check", "name": "g", "input": "a", "reference": "b", "operation": "like",
}).grader.operation == "like"
graded = client.fine_tuning.alpha.graders.run(
    grader={
        "type": "score_model",
        "name": "mark",
        "model": MODEL,
        "input": [{"role": "user", "content": "Mark: {{ sample.output_text }} for {{ item.want }}"}],
        "range": [0, 10],
        "sampling_params": {"max_completions_tokens": 40, "seed": 3},
    },
    model_sample="hello",
    item={"want": "hello"},
)
errors = graded.metadata.errors
assert graded.metadata.type == "score_model" and graded.metadata.sampled_model_name == MODEL
assert 0 <= graded.reward <= 10
graded = client.fine_tuning.alpha.graders.run(
    grader={
        "type": "multi",
        "name": "both",
        "graders": {
            "a": {"type": "string_check", "name": "a", "input": "{{sample.output_text}}", "reference": "hello", "operation": "eq"},
            "b": {"type": "text_similarity", "name": "b", "input": "{{sample.output_text}}", "reference": "{{item.want}}", "evaluation_metric": "rouge_l"},
        },
        "calculate_output": "0.5 * a + 0.5 * b",
    },
    model_sample="hello",
    item={"want": "hello"},
)
assert graded.reward == 1.0 and graded.sub_rewards == {"a": 1.0, "b": 1.0}, graded
assert not errors.formula_parse_error
labelled = client.evals.create(
    data_source_config={"type": "custom", "item_schema": {"type": "object"}, "include_sample_schema": True},
    testing_criteria=[grader],
)
judged = ended(
    client.evals.runs.create(
        labelled.id,
        data_source={
            "type": "jsonl",
            "source": {"type": "file_content", "content": [{"item": {}, "sample": {"output_text": "hi!"}}]},
        },
    )
)
assert judged.status == "completed" and judged.result_counts.errored == 0, judged

# Lists, changes, refusals, the end.
assert [r.id for r in client.evals.runs.list(evaluation.id, order="desc").data] == [second.id, run.id]
assert evaluation.id in [e.id for e in client.evals.list(order="desc", limit=10)]
renamed = client.evals.update(evaluation.id, name="tickets", metadata={"team": "it"})
assert renamed.name == "tickets" and client.evals.retrieve(evaluation.id).metadata == {"team": "it"}
for wrong in [
    lambda: client.evals.create(data_source_config={"type": "custom", "item_schema": {}}, testing_criteria=[]),
    lambda: client.evals.runs.create(evaluation.id, data_source={"type": "jsonl", "source": {"type": "file_id", "id": "file-x"}}),
    lambda: client.evals.runs.cancel(run.id, eval_id=evaluation.id),
]:
    try:
        wrong()
        raise SystemExit("that was not refused")
    except openai.APIStatusError as error:
        assert error.status_code in (400, 409) and error.body["message"], error
for one in (evaluation, logs, labelled):
    client.evals.runs.list(one.id)
    deleted = client.evals.delete(one.id)
    assert deleted.deleted and deleted.eval_id == one.id
try:
    client.evals.runs.retrieve(run.id, eval_id=evaluation.id)
    raise SystemExit("a deleted eval's run is still there")
except openai.NotFoundError:
    pass
client.files.delete(file.id)

# A delivery of a webhook, signed as the server's own test has it, is what the client takes for genuine.
secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"
headers = {"webhook-id": "evt_1", "webhook-timestamp": "1700000000", "webhook-signature": "v1,NNE7l8yBGUIZix+ZWhuw1i0d7yHV58dTPlowMVgdMTA="}
client.webhooks.verify_signature("{}", headers, secret=secret, tolerance=10**10)
try:
    client.webhooks.verify_signature("{ }", headers, secret=secret, tolerance=10**10)
    raise SystemExit("another body has the same signature")
except openai.InvalidWebhookSignatureError:
    pass
print("evals: all as OpenAI's guides say")
