// Fine-tuning by the official Node client: upload, create, follow, ask, delete. The address and the model are
// `OPENAI_BASE_URL` and `BANTAM_MODEL`.

import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ maxRetries: 2 });
const rows = ["rain weather", "cake food", "card money"].flatMap((pair) => {
  const [thing, label] = pair.split(" ");
  return Array(10).fill({
    messages: [
      { role: "user", content: `tell me about ${thing}` },
      { role: "assistant", content: label },
    ],
  });
});
const text = rows.map((row) => JSON.stringify(row) + "\n").join("");
const file = await client.files.create({ file: await toFile(Buffer.from(text), "rows.jsonl"), purpose: "fine-tune" });
let job = await client.fineTuning.jobs.create({
  model: process.env.BANTAM_MODEL,
  training_file: file.id,
  suffix: "node",
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 5 } } },
});
const deadline = Date.now() + 300_000;
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  assert(Date.now() < deadline, "the job takes too long");
  await new Promise((done) => setTimeout(done, 200));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
assert.equal(job.status, "succeeded", JSON.stringify(job.error));
const steps = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 5 })) {
  if (event.type === "metrics") steps.push(event.data.step);
}
assert.equal(steps.length, 12);
const answer = await client.chat.completions.create({
  model: job.fine_tuned_model,
  messages: [{ role: "user", content: "tell me about rain" }],
  max_tokens: 4,
});
assert.equal(answer.choices.length, 1);
assert((await client.models.delete(job.fine_tuned_model)).deleted);
assert((await client.files.delete(file.id)).deleted);
console.log("1 passed, 0 failed");
