//! `bantam keys`: who may use a server, and how much of it.

use std::path::Path;

use anyhow::anyhow;
use bantam_store::{Key, KeyLimits, NewKey, Scope, Store};
use serde_json::{Value, json};

use super::Context;
use crate::args::{KeysCommand, KeysCreateArgs, KeysListArgs, KeysRevokeArgs, ScopeArg};
use crate::error::advise;
use crate::http::now;
use crate::printer::{Align, Table, thousands};

/// Runs one of the three.
pub(crate) fn run(context: &Context, command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Create(args) => create(context, &args),
        KeysCommand::List(args) => list(context, &args),
        KeysCommand::Revoke(args) => revoke(context, &args),
    }
}

/// A database that is there already.
fn existing(path: &Path) -> anyhow::Result<Store> {
    if !path.is_file() {
        return Err(advise(
            anyhow!("there is no database of keys at {}", path.display()),
            "`bantam keys create --keys FILE` makes one",
        ));
    }
    Ok(Store::open(path)?)
}

fn create(context: &Context, args: &KeysCreateArgs) -> anyhow::Result<()> {
    let store = Store::open(&args.keys)?;
    let scope = |scope: &ScopeArg| match scope {
        ScopeArg::Inference => Scope::Inference,
        ScopeArg::Train => Scope::Train,
        ScopeArg::Admin => Scope::Admin,
    };
    let limits = KeyLimits {
        requests_per_minute: args.requests_per_minute,
        tokens_per_minute: args.tokens_per_minute,
        tokens_per_day: args.tokens_per_day,
    };
    let scopes = args.scope.iter().map(scope).collect();
    let (key, text) = NewKey::generate(&args.name, scopes, limits, now())?;
    store.create_key(&key)?;
    if args.json.json {
        return context.printer.json(&json!({"id": key.id, "key": text}));
    }
    context
        .printer
        .note("this key is shown once; only its digest is kept");
    context.printer.line(text)?;
    Ok(())
}

fn list(context: &Context, args: &KeysListArgs) -> anyhow::Result<()> {
    let keys = existing(&args.keys)?.keys()?;
    if args.json.json {
        let keys: Vec<Value> = keys.iter().map(show).collect();
        return context.printer.json(&json!({"keys": keys}));
    }
    let mut table = Table::new([
        ("id", Align::Left),
        ("name", Align::Left),
        ("scopes", Align::Left),
        ("requests/min", Align::Right),
        ("tokens/min", Align::Right),
        ("tokens/day", Align::Right),
        ("last used", Align::Right),
        ("state", Align::Left),
    ]);
    let limit = |n: Option<u64>| n.map_or_else(|| "any".to_owned(), thousands);
    for key in &keys {
        table.row([
            key.id.clone(),
            key.name.clone(),
            scopes(key).join(" "),
            limit(key.limits.requests_per_minute.map(u64::from)),
            limit(key.limits.tokens_per_minute.map(u64::from)),
            limit(key.limits.tokens_per_day),
            key.last_used.map_or_else(|| "never".to_owned(), ago),
            if key.revoked.is_some() {
                "revoked"
            } else {
                "good"
            }
            .to_owned(),
        ]);
    }
    let text = table.render(context.printer.out_style());
    context.printer.line(text.trim_end())?;
    Ok(())
}

fn revoke(context: &Context, args: &KeysRevokeArgs) -> anyhow::Result<()> {
    let store = existing(&args.keys)?;
    if !store.revoke_key(&args.id, now())? {
        return Err(advise(
            anyhow!("no key `{}` is good here", args.id),
            "`bantam keys list` shows the names",
        ));
    }
    if args.json.json {
        return context
            .printer
            .json(&json!({"id": args.id, "revoked": true}));
    }
    context
        .printer
        .note(format!("`{}` opens nothing any more", args.id));
    Ok(())
}

fn scopes(key: &Key) -> Vec<&'static str> {
    key.scopes.iter().map(|scope| scope.name()).collect()
}

fn show(key: &Key) -> Value {
    json!({
        "id": key.id,
        "name": key.name,
        "scopes": scopes(key),
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
        "tokens_per_day": key.limits.tokens_per_day,
        "created": key.created,
        "last_used": key.last_used,
        "revoked": key.revoked,
    })
}

fn ago(time: u64) -> String {
    let seconds = now().saturating_sub(time);
    match seconds {
        0..60 => "now".to_owned(),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86_400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}
