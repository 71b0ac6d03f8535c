// The official Node client against a running server.
//
// The address, the key and the model's name come from OPENAI_BASE_URL, OPENAI_API_KEY and BANTAM_MODEL.
// Exits non-zero at the first thing that is wrong. `cargo xtask test --only clients` runs it.

import assert from "node:assert/strict";
import OpenAI from "openai";

const model = process.env.BANTAM_MODEL ?? "tiny";
const client = new OpenAI({ maxRetries: 0, timeout: 60_000 });
const messages = [
  { role: "system", content: "Name the topic." },
  { role: "user", content: "where is the card?" },
];

const checks = {
  async "the model is listed and described"() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.ok(ids.includes(model), `models are ${ids}`);
    const entry = await client.models.retrieve(model);
    assert.equal(entry.object, "model");
  },

  async "a plain completion has a message, a reason and usage"() {
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 6, temperature: 0 });
    assert.equal(answer.object, "chat.completion");
    assert.match(answer.id, /^chatcmpl-/);
    const [choice] = answer.choices;
    assert.equal(choice.message.role, "assistant");
    assert.equal(typeof choice.message.content, "string");
    assert.ok(["stop", "length"].includes(choice.finish_reason));
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    assert.ok(prompt_tokens > 0 && completion_tokens <= 6);
    assert.equal(total_tokens, prompt_tokens + completion_tokens);
    assert.ok(answer._request_id, "x-request-id is told");
  },

  async "a stream spells the same answer and ends with usage"() {
    const body = { model, messages, max_tokens: 12, temperature: 0 };
    const plain = await client.chat.completions.create(body);
    const stream = await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
    let text = "";
    let reason = null;
    let usage = null;
    for await (const chunk of stream) {
      assert.equal(chunk.object, "chat.completion.chunk");
      for (const choice of chunk.choices) {
        text += choice.delta.content ?? "";
        reason = choice.finish_reason ?? reason;
      }
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, plain.choices[0].message.content);
    assert.equal(reason, plain.choices[0].finish_reason);
    assert.equal(usage.total_tokens, plain.usage.total_tokens);
  },

  async "a seed repeats a sampled answer"() {
    const body = { model, messages, max_tokens: 8, temperature: 1, seed: 7 };
    const once = await client.chat.completions.create(body);
    const again = await client.chat.completions.create(body);
    assert.equal(once.choices[0].message.content, again.choices[0].message.content);
  },

  async "a broken-off stream leaves the server well"() {
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 200, stream: true });
    for await (const _ of stream) break;
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 1 });
    assert.equal(answer.usage.completion_tokens, 1);
  },

  async "eight at once are all answered"() {
    const ask = () => client.chat.completions.create({ model, messages, max_tokens: 5, temperature: 0 });
    const answers = await Promise.all(Array.from({ length: 8 }, ask));
    assert.equal(new Set(answers.map((a) => a.choices[0].message.content)).size, 1, "the same question has one answer");
  },

  async "an unknown model is a 404"() {
    const call = client.chat.completions.create({ model: "no-such-model", messages });
    await assert.rejects(call, (e) => e instanceof OpenAI.NotFoundError && e.message.includes("no-such-model"));
  },

  async "an unknown field is a 400 that names it"() {
    const call = client.chat.completions.create({ model, messages, temprature: 0 });
    await assert.rejects(call, (e) => {
      assert.ok(e instanceof OpenAI.BadRequestError, String(e));
      assert.ok(e.message.includes("temprature"), e.message);
      assert.ok(e.requestID, "x-request-id is told");
      return true;
    });
  },

  async "a prompt past the context is a 400, not cut short"() {
    const long = [{ role: "user", content: "card ".repeat(2000) }];
    await assert.rejects(client.chat.completions.create({ model, messages: long }), OpenAI.BadRequestError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok: ${name}`);
}
