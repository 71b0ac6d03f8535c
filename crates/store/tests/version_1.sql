-- A database as the first version of the schema made it, with something in each table.
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, hash BLOB NOT NULL, scopes TEXT NOT NULL,
        rpm INTEGER, tpm INTEGER, tokens_per_day INTEGER,
        created INTEGER NOT NULL, last_used INTEGER, revoked INTEGER
    );
    CREATE TABLE key_days (
        key TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (key, day)
    ) WITHOUT ROWID;
    CREATE TABLE objects (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, created INTEGER NOT NULL,
        label TEXT NOT NULL, expires INTEGER, metadata TEXT NOT NULL, body TEXT NOT NULL, extra TEXT NOT NULL
    );
    CREATE INDEX objects_by_kind ON objects (kind, owner, seq);
    CREATE TABLE chunks (
        file TEXT NOT NULL, n INTEGER NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (file, n)
    ) WITHOUT ROWID;
    CREATE TABLE lines (
        batch TEXT NOT NULL, n INTEGER NOT NULL, failed INTEGER NOT NULL, tokens INTEGER NOT NULL,
        body TEXT NOT NULL, PRIMARY KEY (batch, n)
    ) WITHOUT ROWID;
    CREATE TABLE once (
        owner TEXT NOT NULL, name TEXT NOT NULL, digest BLOB NOT NULL, created INTEGER NOT NULL,
        status INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (owner, name)
    ) WITHOUT ROWID;
    INSERT INTO keys VALUES ('pub', 'a key', zeroblob(32), 'inference', NULL, 5, NULL, 1, NULL, NULL);
    INSERT INTO objects (kind, id, owner, created, label, expires, metadata, body, extra)
        VALUES ('thing', 'old', 'me', 7, 'm', NULL, '{"a":"b"}', '{"id":"old"}', 'null');
    INSERT INTO chunks VALUES ('old', 0, x'6162');
    INSERT INTO lines VALUES ('old', 0, 0, 3, 'answer');
    PRAGMA user_version = 1;
