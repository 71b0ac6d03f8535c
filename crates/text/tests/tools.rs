//! Tools: found syntax, the convention, grammars that hold every answer to it, and reading calls back.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;

use bantam_text::{
    CallKind, Chat, ChatTemplate, ConstraintEngine, ConstraintSpec, CustomInput, CustomTool,
    Message, TemplateTokens, Tool, ToolDemand, ToolGrammar, ToolParser, ToolPiece, fuzz,
};
use proptest::prelude::*;
use serde_json::{Value, json};

const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A template with tools of its own, written like those of well-known models.
const NATIVE: &str = "{%- if tools %}{{- '<|im_start|>system\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '</tools><|im_end|>\n' }}{%- endif %}{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}{%- for tool_call in message.tool_calls %}{{- '\n[[' }}{{- tool_call.function.name }}{{- '|' }}{{- tool_call.function.arguments | tojson }}{{- ']]' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

fn chat(source: &str) -> Chat {
    let template = ChatTemplate::new(source, TemplateTokens::default(), None).unwrap();
    Chat::new(fuzz::byte_tokenizer(), template, &[]).unwrap()
}

fn tools() -> Vec<Tool> {
    serde_json::from_value(json!([
        {"type": "function", "function": {"name": "weather", "description": "Of a place.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"]}}},
        {"type": "function", "function": {"name": "now"}},
    ]))
    .unwrap()
}

fn call(name: &str, arguments: &str) -> Value {
    json!({"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}})
}

fn talk() -> Vec<Message> {
    serde_json::from_value(json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": null, "tool_calls": [call("weather", "{\"city\":\"Rome\"}"), call("now", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "dry"},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "assistant", "content": "No."},
    ]))
    .unwrap()
}

fn grammar(chat: &Chat, demand: ToolDemand) -> ToolGrammar {
    ToolGrammar {
        functions: tools(),
        customs: Vec::new(),
        demand,
        parallel: true,
        answer: None,
        syntax: chat.tool_syntax().clone(),
    }
}

#[test]
fn a_template_without_tools_is_told_in_words() {
    let c = chat(CHATML);
    assert!(!c.tool_syntax().is_native());
    let text = c.render(&talk(), &tools(), true).unwrap();
    let want = "<|im_start|>system\nBe brief.\n\nYou may call these tools:\n\
        {\"name\": \"weather\", \"description\": \"Of a place.\", \"parameters\": {\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\", \"maxLength\": 4}, \"days\": {\"type\": \"integer\", \"minimum\": 1, \"maximum\": 9}}, \"required\": [\"city\"]}}\n\
        {\"name\": \"now\"}\n\
        To call one, answer with\n<tool_call>\n{\"name\": \"NAME\", \"arguments\": {ARGUMENTS}}\n</tool_call><|im_end|>\n\
        <|im_start|>user\nRain?<|im_end|>\n\
        <|im_start|>assistant\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call><|im_end|>\n\
        <|im_start|>user\n<tool_response>\ndry\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n\
        <|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text, want);
    // What is trained is what is served: the same ids, and the call is learned with its end of turn.
    let example = c.example(&talk(), &tools()).unwrap();
    let prompt = c.prompt(&talk()[..2], &tools()).unwrap();
    assert_eq!(example.tokens[..prompt.len()], prompt);
    let preview = c.preview(&example);
    assert!(
        preview.contains("⟦<tool_call>\n{\"name\": \"weather\"")
            && preview.contains("</tool_call><|im_end|>\n⟧"),
        "{preview}"
    );
}

#[test]
fn a_template_with_tools_shows_its_own_syntax() {
    let c = chat(NATIVE);
    assert!(c.tool_syntax().is_native() && c.tool_syntax().takes_parallel());
    let text = c.render(&talk()[..3], &tools(), false).unwrap();
    assert!(text.starts_with("<|im_start|>system\n<tools>\n{\"type\": \"function\""));
    assert!(text.ends_with(
        "<|im_start|>assistant\n[[weather|{\"city\": \"Rome\"}]]\n[[now|{}]]<|im_end|>\n"
    ));
}

/// The text of an answer that takes any of the allowed tokens, by chance but leaning towards an end.
fn walk(spec: &ConstraintSpec, choices: &[u16]) -> Option<String> {
    let tokenizer = fuzz::byte_tokenizer();
    let engine = ConstraintEngine::new(&tokenizer, &[2]).unwrap();
    let mut constraint = engine.compile(spec).unwrap();
    let mut ids = Vec::new();
    for choice in choices {
        let all: Vec<u32> = constraint.allowed().unwrap().iter().collect();
        if all.contains(&2) && (choice % 3 == 0 || all.len() == 1) {
            return Some(tokenizer.decode(&ids));
        }
        let open: Vec<u32> = all.into_iter().filter(|id| *id != 2).collect();
        let closing = |id: &&u32| b"\"}".contains(&tokenizer.token_bytes(**id)[0]);
        let first = open.iter().find(closing).filter(|_| choice % 2 == 0);
        let id = *first.unwrap_or(&open[usize::from(*choice) % open.len()]);
        constraint.commit(id).unwrap();
        ids.push(id);
        if constraint.is_done() {
            return Some(tokenizer.decode(&ids));
        }
    }
    None
}

type Calls = Vec<(CallKind, String, String, bool)>;

/// Text outside calls, and the calls: name, input, whether complete.
fn read(grammar: &ToolGrammar, pieces: &[&str]) -> (String, Calls) {
    let mut parser = ToolParser::new(grammar);
    let mut all: Vec<ToolPiece> = pieces.iter().flat_map(|text| parser.push(text)).collect();
    all.extend(parser.finish());
    let (mut text, mut calls) = (String::new(), Calls::new());
    for piece in all {
        match piece {
            ToolPiece::Text(more) => text.push_str(&more),
            ToolPiece::Begin { kind, name } => calls.push((kind, name, String::new(), false)),
            ToolPiece::Input(more) => calls.last_mut().unwrap().2.push_str(&more),
            ToolPiece::End => calls.last_mut().unwrap().3 = true,
        }
    }
    (text, calls)
}

fn check_calls(calls: &Calls) {
    for (kind, name, input, complete) in calls {
        assert!(complete, "{calls:?}");
        assert_eq!(*kind, CallKind::Function);
        let arguments: Value = serde_json::from_str(input).unwrap();
        let fields = arguments.as_object().unwrap();
        match name.as_str() {
            "now" => assert!(fields.is_empty()),
            "weather" => {
                assert!(fields["city"].as_str().unwrap().chars().count() <= 4);
                let days = fields.get("days").map(|d| d.as_i64().unwrap());
                assert!(days.is_none_or(|d| (1..=9).contains(&d)));
                assert!(fields.keys().all(|k| k == "city" || k == "days"));
            }
            other => panic!("{other}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_is_chosen_calls_are_valid(choices in prop::collection::vec(any::<u16>(), 400), native: bool) {
        let c = chat(if native { NATIVE } else { CHATML });
        let required = grammar(&c, ToolDemand::Required);
        if let Some(text) = walk(&ConstraintSpec::Tools(Box::new(required.clone())), &choices) {
            let (rest, calls) = read(&required, &[&text]);
            assert_eq!(rest, "");
            assert!(!calls.is_empty(), "{text}");
            check_calls(&calls);
            // In pieces it reads the same.
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = chars.iter().map(String::as_str).collect();
            assert_eq!(read(&required, &pieces), (rest, calls));
        }
        let one = ToolGrammar { parallel: false, ..required };
        if let Some(text) = walk(&ConstraintSpec::Tools(Box::new(one.clone())), &choices) {
            assert_eq!(read(&one, &[&text]).1.len(), 1);
        }
        let auto = grammar(&c, ToolDemand::Auto);
        if let Some(text) = walk(&ConstraintSpec::Tools(Box::new(auto.clone())), &choices) {
            check_calls(&read(&auto, &[&text]).1);
        }
    }
}

/// Does the grammar allow this whole text?
fn allows(spec: &ConstraintSpec, text: &str) -> bool {
    let tokenizer = fuzz::byte_tokenizer();
    let engine = ConstraintEngine::new(&tokenizer, &[2]).unwrap();
    let mut constraint = engine.compile(spec).unwrap();
    for id in tokenizer.encode_plain(text) {
        if constraint.is_done() || !constraint.allowed().unwrap().allows(id) {
            return false;
        }
        constraint.commit(id).unwrap();
    }
    constraint.is_done() || constraint.allowed().unwrap().allows(2)
}

#[test]
fn free_answers_may_speak_and_then_call() {
    let c = chat(CHATML);
    let auto = grammar(&c, ToolDemand::Auto);
    let spec = ConstraintSpec::Tools(Box::new(auto.clone()));
    let good = "Let me look.\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    for text in ["", "Hello.", "a < b and <tool", good, &good[13..]] {
        assert!(allows(&spec, text), "{text}");
    }
    for text in [
        "<tool_call>",
        "x <tool_call> y",
        "<tool_call>\n{\"name\": \"nope\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Romee\"}}\n</tool_call>",
    ] {
        assert!(!allows(&spec, text), "{text}");
    }
    let (text, calls) = read(&auto, &[good]);
    assert_eq!((text.as_str(), calls.len()), ("Let me look.", 1));
    assert_eq!(read(&auto, &["a <", "tool", " b\n"]).0, "a <tool b\n");
    // With a format, an answer is a call or of that format.
    let formatted = ToolGrammar {
        answer: Some(Box::new(ConstraintSpec::JsonObject)),
        ..auto
    };
    let spec = ConstraintSpec::Tools(Box::new(formatted));
    assert!(allows(&spec, "{\"a\": 1}") && allows(&spec, &good[13..]));
    assert!(!allows(&spec, "Hello.") && !allows(&spec, good));
}

#[test]
fn custom_tools_take_text_of_their_grammar() {
    let c = chat(CHATML);
    let custom = |name: &str, input| CustomTool {
        name: name.into(),
        description: None,
        input,
    };
    let tools = ToolGrammar {
        customs: vec![
            custom("note", CustomInput::Text),
            custom(
                "sum",
                CustomInput::Lark("start: NUM (\"+\" NUM)*\nNUM: /[0-9]+/".into()),
            ),
            custom("code", CustomInput::Regex("[A-Z]{2}[0-9]".into())),
        ],
        ..grammar(&c, ToolDemand::Auto)
    };
    let spec = ConstraintSpec::Tools(Box::new(tools.clone()));
    for (name, input, valid) in [
        ("note", "anything <b> \"goes\"\n{", true),
        ("sum", "1+22+3", true),
        ("sum", "1+", false),
        ("code", "AB1", true),
        ("code", "AB12", false),
    ] {
        let text = format!("Now: {}", bantam_text::custom_call(name, input));
        assert_eq!(allows(&spec, &text), valid, "{text}");
        if valid {
            let (said, calls) = read(&tools, &[&text]);
            assert_eq!(said, "Now:");
            let want = (CallKind::Custom, name.to_string(), input.to_string(), true);
            assert_eq!(calls, [want]);
        }
    }
    let after = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<custom_call name=\"sum\">\n7";
    assert!(allows(&spec, after));
    assert_eq!(read(&tools, &[after]).1.len(), 2);
    let prompt = c
        .prompt_with(&[Message::user("u")], &[], &tools.customs)
        .unwrap();
    let text = c.tokenizer().decode(&prompt);
    assert!(text.contains("\"syntax\": \"regex\"") && text.contains("<custom_call name="));
}

#[test]
fn what_cannot_be_enforced_is_refused() {
    let c = chat(CHATML);
    let engine = ConstraintEngine::new(&Arc::clone(c.tokenizer()), c.end_tokens()).unwrap();
    let mut bad = grammar(&c, ToolDemand::Auto);
    bad.functions[1].function.parameters = Some(json!({"type": "object", "not": {}}));
    assert!(
        engine
            .compile(&ConstraintSpec::Tools(Box::new(bad)))
            .is_err()
    );
}
