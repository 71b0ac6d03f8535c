//! What is kept comes back, in order, to its owner, and after a restart.
#![allow(clippy::unwrap_used, reason = "a test")]

use bantam_store::{
    Key, KeyLimits, Line, ListQuery, NewKey, Object, Remembered, Scope, Store, StoreError,
    hash_secret,
};
use serde_json::{Map, json};

fn object(id: &str, owner: &str, label: &str, pair: Option<(&str, &str)>) -> Object {
    Object {
        kind: "thing".into(),
        parent: String::new(),
        id: id.into(),
        owner: owner.into(),
        created: 7,
        label: label.into(),
        expires: None,
        metadata: pair
            .map(|(k, v)| Map::from_iter([(k.to_string(), json!(v))]))
            .unwrap_or_default(),
        body: json!({"id": id, "n": 1.5}),
        extra: json!(["é"]),
    }
}

fn ids(store: &Store, owner: &str, query: &ListQuery) -> (Vec<String>, bool) {
    let page = store.list("thing", owner, query).unwrap().unwrap();
    (
        page.objects.into_iter().map(|o| o.id).collect(),
        page.has_more,
    )
}

#[test]
fn objects_belong_to_their_owner() {
    let store = Store::in_memory().unwrap();
    let first = object("a", "me", "m", None);
    store.insert(&first).unwrap();
    assert_eq!(store.get("thing", "me", "a").unwrap(), Some(first.clone()));
    assert_eq!(store.get("thing", "you", "a").unwrap(), None);
    assert_eq!(store.get("other", "me", "a").unwrap(), None);
    assert!(store.insert(&first).is_err(), "names are unique");
    assert!(!store.delete("thing", "you", "a").unwrap());
    let changed = Object {
        body: json!(null),
        ..first
    };
    assert!(store.update(&changed).unwrap());
    assert_eq!(store.get("thing", "me", "a").unwrap(), Some(changed));
    assert!(store.delete("thing", "me", "a").unwrap());
    assert!(!store.delete("thing", "me", "a").unwrap());
}

#[test]
fn lists_have_cursors_and_filters() {
    let store = Store::in_memory().unwrap();
    for (i, id) in ["a", "b", "c", "d"].iter().enumerate() {
        let label = if i % 2 == 0 { "even" } else { "odd" };
        store
            .insert(&object(
                id,
                "me",
                label,
                Some(("k", if i < 3 { "x" } else { "y" })),
            ))
            .unwrap();
    }
    store.insert(&object("z", "you", "even", None)).unwrap();
    let all = ListQuery {
        limit: 10,
        ..ListQuery::default()
    };
    assert_eq!(ids(&store, "me", &all).0, ["d", "c", "b", "a"]);
    let up = ListQuery {
        ascending: true,
        limit: 3,
        ..all.clone()
    };
    assert_eq!(
        ids(&store, "me", &up),
        (vec!["a".into(), "b".into(), "c".into()], true)
    );
    let rest = ListQuery {
        after: Some("c".into()),
        ..up.clone()
    };
    assert_eq!(ids(&store, "me", &rest), (vec!["d".into()], false));
    let odd = ListQuery {
        label: Some("odd".into()),
        ..all.clone()
    };
    assert_eq!(ids(&store, "me", &odd).0, ["d", "b"]);
    let x = ListQuery {
        metadata: vec![("k".into(), "x".into())],
        ..all.clone()
    };
    assert_eq!(ids(&store, "me", &x).0, ["c", "b", "a"]);
    let hostile = ListQuery {
        metadata: vec![("k\" OR 1=1 --".into(), "'".into())],
        ..all.clone()
    };
    assert!(ids(&store, "me", &hostile).0.is_empty());
    let gone = ListQuery {
        after: Some("nobody".into()),
        ..all
    };
    assert!(store.list("thing", "me", &gone).unwrap().is_none());
}

#[test]
fn files_and_lines_go_with_their_object() {
    let store = Store::in_memory().unwrap();
    let mut short = object("f", "me", "m", None);
    short.expires = Some(100);
    store.insert(&short).unwrap();
    store.append_chunk("f", 0, b"ab").unwrap();
    store.append_chunk("f", 1, b"c").unwrap();
    assert_eq!(store.chunk("f", 1).unwrap(), Some(b"c".to_vec()));
    assert_eq!(store.chunk("f", 2).unwrap(), None);
    let line = |n, failed| Line {
        n,
        failed,
        tokens: 3,
        body: format!("{n}"),
    };
    for (n, failed) in [(0, false), (2, true), (1, false)] {
        store.put_line("f", &line(n, failed)).unwrap();
    }
    store.put_line("f", &line(1, true)).unwrap();
    assert_eq!(
        store.answered("f").unwrap(),
        [(0, false), (1, false), (2, true)]
    );
    assert_eq!(store.lines("f", false, 1, 9).unwrap(), [line(1, false)]);
    assert_eq!(store.forget_expired(99).unwrap(), 0);
    assert_eq!(store.forget_expired(100).unwrap(), 1);
    assert_eq!(store.chunk("f", 0).unwrap(), None);
    assert!(store.answered("f").unwrap().is_empty());
}

#[test]
fn parts_go_with_their_whole() {
    let store = Store::in_memory().unwrap();
    store.insert(&object("whole", "me", "m", None)).unwrap();
    for id in ["p1", "p2", "other"] {
        let mut part = object(id, "me", "m", None);
        if id != "other" {
            part.parent = "whole".into();
        }
        store.insert(&part).unwrap();
        for n in 0..5 {
            let line = Line {
                n,
                failed: n % 2 == 1,
                tokens: 0,
                body: String::new(),
            };
            store.put_line(id, &line).unwrap();
        }
    }
    let parts = ListQuery {
        limit: 9,
        parent: Some("whole".into()),
        ascending: true,
        ..ListQuery::default()
    };
    assert_eq!(
        ids(&store, "me", &parts),
        (vec!["p1".into(), "p2".into()], false)
    );
    let page = |after, ascending, failed| -> Vec<u64> {
        let page = store.page_of_lines("p1", after, ascending, failed, 2);
        page.unwrap().iter().map(|line| line.n).collect()
    };
    assert_eq!(page(None, true, None), [0, 1]);
    assert_eq!(page(Some(1), true, None), [2, 3]);
    assert_eq!(page(Some(3), false, None), [2, 1]);
    assert_eq!(page(None, false, Some(true)), [3, 1]);
    assert_eq!(page(None, true, Some(false)), [0, 2]);
    assert_eq!(store.line("p1", 4).unwrap().unwrap().n, 4);
    assert!(store.line("p1", 5).unwrap().is_none());
    assert!(store.delete("thing", "me", "whole").unwrap());
    assert!(store.get("thing", "me", "p1").unwrap().is_none());
    assert!(store.answered("p2").unwrap().is_empty());
    assert_eq!(store.answered("other").unwrap().len(), 5);
}

#[test]
fn a_database_of_the_first_version_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bantam.db");
    let old = rusqlite::Connection::open(&path).unwrap();
    old.execute_batch(include_str!("version_1.sql")).unwrap();
    drop(old);
    for _ in 0..2 {
        let store = Store::open(&path).unwrap();
        let found = store.get("thing", "me", "old").unwrap().unwrap();
        assert_eq!((found.parent.as_str(), found.created), ("", 7));
        assert_eq!(found.metadata["a"], "b");
        assert_eq!(store.chunk("old", 0).unwrap(), Some(b"ab".to_vec()));
        assert_eq!(store.answered("old").unwrap(), [(0, false)]);
        assert!(store.key("pub").unwrap().is_some());
    }
}

#[test]
fn keys_open_until_they_are_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.db");
    let store = Store::open(&path).unwrap();
    let new = NewKey {
        id: "pub".into(),
        name: "team".into(),
        hash: hash_secret("s3cret"),
        scopes: vec![Scope::Inference, Scope::Admin],
        limits: KeyLimits {
            tokens_per_day: Some(10),
            ..KeyLimits::default()
        },
        created: 5,
    };
    store.create_key(&new).unwrap();
    store.touch_key("pub", 60).unwrap();
    assert_eq!(store.spend("pub", 1, 4).unwrap(), 4);
    assert_eq!(store.spend("pub", 1, 0).unwrap(), 4);
    assert_eq!(store.spend("pub", 2, 1).unwrap(), 1);
    drop(store);
    // Another process, as it were.
    let store = Store::open(&path).unwrap();
    let key: Key = store.key("pub").unwrap().unwrap();
    assert!(key.opens("s3cret") && !key.opens("s3creT") && !key.opens(""));
    assert_eq!((key.scopes, key.last_used), (new.scopes, Some(60)));
    assert!(store.revoke_key("pub", 9).unwrap());
    assert!(!store.revoke_key("pub", 9).unwrap());
    assert!(!store.key("pub").unwrap().unwrap().opens("s3cret"));
    assert_eq!(store.keys().unwrap().len(), 1);
    let raw = std::fs::read(&path).unwrap();
    assert!(!raw.windows(6).any(|w| w == b"s3cret"));
}

#[test]
fn answers_are_remembered_for_a_while() {
    let store = Store::in_memory().unwrap();
    let answer = Remembered {
        digest: [1; 32],
        status: 200,
        body: b"{}".to_vec(),
    };
    store.remember("me", "n", 50, &answer).unwrap();
    assert_eq!(store.remembered("me", "n", 50).unwrap(), Some(answer));
    assert_eq!(store.remembered("me", "n", 51).unwrap(), None);
    assert_eq!(store.remembered("you", "n", 0).unwrap(), None);
    assert_eq!(store.forget_remembered(51).unwrap(), 1);
}

#[test]
fn other_files_and_newer_versions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("notes.txt");
    std::fs::write(&text, "this is not a database, whatever it is called").unwrap();
    assert!(matches!(Store::open(&text), Err(StoreError::Open { .. })));
}
