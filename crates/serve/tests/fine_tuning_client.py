"""Fine-tuning by the official `openai` client, as OpenAI's guides do it.

    python fine_tuning_client.py BASE_URL MODEL      (BASE_URL ends in /v1)

Uploads examples, trains MODEL on them, follows the job, asks the tuned model and its checkpoints, and deletes
everything again. Only `base_url` is Bantam's.
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


def rows(n):
    topics = [("rain", "weather"), ("a cake", "food"), ("my card", "money")]
    for i in range(n):
        thing, label = topics[i % 3]
        yield {
            "messages": [
                {"role": "system", "content": "Name the topic."},
                {"role": "user", "content": f"tell me about {thing}"},
                {"role": "assistant", "content": label},
            ]
        }


def jsonl(rows):
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


training = client.files.create(file=("train.jsonl", jsonl(rows(60))), purpose="fine-tune")
validation = client.files.create(file=("valid.jsonl", jsonl(rows(9))), purpose="fine-tune")
training = client.files.wait_for_processing(training.id)
assert training.purpose == "fine-tune" and training.status == "processed", training

job = client.fine_tuning.jobs.create(
    model=MODEL,
    training_file=training.id,
    validation_file=validation.id,
    suffix="topics",
    seed=42,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}},
    metadata={"team": "support"},
)
assert job.object == "fine_tuning.job" and job.id.startswith("ftjob-"), job
assert job.status in ("validating_files", "queued", "running") and job.fine_tuned_model is None

deadline = time.time() + 300
while job.status not in ("succeeded", "failed", "cancelled"):
    assert time.time() < deadline, job
    time.sleep(0.2)
    job = client.fine_tuning.jobs.retrieve(job.id)
assert job.status == "succeeded", job
assert job.fine_tuned_model.startswith("ft:") and ":topics:" in job.fine_tuned_model, job.fine_tuned_model
assert job.trained_tokens > 0 and job.finished_at >= job.created_at and job.seed == 42
assert job.hyperparameters.n_epochs == 3 and job.error is None, job

assert job.id in [one.id for one in client.fine_tuning.jobs.list(limit=1)]
assert [one.id for one in client.fine_tuning.jobs.list(extra_query={"metadata[team]": "support"})][0] == job.id

# Page by page, newest first.
events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
steps = [event.data["step"] for event in events if event.type == "metrics"]
assert steps == list(range(45, 0, -1)), steps
assert all(event.id.startswith("ftevent-") for event in events)
assert len({event.id for event in events}) == len(events)
assert any("validation loss" in event.message for event in events)

checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
assert [point.step_number for point in checkpoints] == [45, 30, 15], checkpoints
assert all(point.metrics.train_loss > 0 for point in checkpoints)
for model in [job.fine_tuned_model, checkpoints[-1].fine_tuned_model_checkpoint]:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "tell me about rain"}], max_tokens=4
    )
    assert answer.choices[0].message.role == "assistant"
assert list(client.fine_tuning.checkpoints.permissions.list(job.fine_tuned_model)) == []

table = client.files.content(job.result_files[0]).text.splitlines()
assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(table) == 46

other = client.fine_tuning.jobs.create(
    model=MODEL, training_file=training.id, hyperparameters={"n_epochs": 50, "batch_size": 1}
)
assert client.fine_tuning.jobs.cancel(other.id).status == "cancelled"

for what, kind in [
    (lambda: client.fine_tuning.jobs.retrieve("ftjob-none"), openai.NotFoundError),
    (lambda: client.fine_tuning.jobs.create(model="nobody", training_file=training.id), openai.NotFoundError),
    (lambda: client.fine_tuning.jobs.create(model=MODEL, training_file="file-none"), openai.BadRequestError),
    (
        lambda: client.fine_tuning.jobs.create(
            model=MODEL, training_file=training.id, method={"type": "reinforcement"}
        ),
        openai.BadRequestError,
    ),
    (lambda: client.fine_tuning.jobs.cancel(other.id), openai.BadRequestError),
]:
    try:
        what()
    except kind as error:
        assert error.request_id and error.code, error
    else:
        raise AssertionError("it was not refused")

assert client.models.delete(job.fine_tuned_model).deleted
assert job.fine_tuned_model not in [model.id for model in client.models.list()]
for one in [training.id, validation.id, job.result_files[0]]:
    assert client.files.delete(one).deleted
print("1 passed, 0 failed")
