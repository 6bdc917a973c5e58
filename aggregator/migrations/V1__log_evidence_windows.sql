-- What Coalmine keeps. Portable: one-row locks, primary keys and upserts; no advisory locks, no LISTEN.

CREATE TABLE log_head (
    log   text   PRIMARY KEY,
    size  bigint NOT NULL,
    -- Leaf hash of the last record.
    prev  bytea  NOT NULL,
    -- The term of the only aggregator that may write.
    term  bigint NOT NULL
);

-- The records, byte for byte as in decisions.jsonl.
CREATE TABLE log_entry (
    log   text   NOT NULL,
    seq   bigint NOT NULL,
    line  bytea  NOT NULL,
    leaf  bytea  NOT NULL,
    id    text,
    PRIMARY KEY (log, seq)
);
CREATE UNIQUE INDEX log_entry_id ON log_entry (log, id);

CREATE TABLE log_checkpoint (
    log   text   NOT NULL,
    size  bigint NOT NULL,
    note  text   NOT NULL,
    PRIMARY KEY (log, size)
);

CREATE TABLE evidence_blob (
    sha256  bytea PRIMARY KEY,
    bytes   bytea NOT NULL
);
-- The bytes are compressed already.
ALTER TABLE evidence_blob ALTER COLUMN bytes SET STORAGE EXTERNAL;

-- The book, in pieces that change on their own.
CREATE TABLE window_piece (
    log      text  NOT NULL,
    service  text  NOT NULL,
    key      text  NOT NULL,
    payload  bytea NOT NULL,
    PRIMARY KEY (log, service, key)
);
ALTER TABLE window_piece ALTER COLUMN payload SET STORAGE EXTERNAL;

CREATE TABLE lease (
    log      text        PRIMARY KEY,
    owner    text        NOT NULL,
    term     bigint      NOT NULL,
    expires  timestamptz NOT NULL
);

-- A second fence behind the grants. Whoever owns the tables can take it away; signatures and checkpoints that are
-- kept elsewhere are what detects that.
CREATE FUNCTION coalmine_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP;
END
$$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON log_entry
    FOR EACH STATEMENT EXECUTE FUNCTION coalmine_append_only();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON log_checkpoint
    FOR EACH STATEMENT EXECUTE FUNCTION coalmine_append_only();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON evidence_blob
    FOR EACH STATEMENT EXECUTE FUNCTION coalmine_append_only();

-- Group roles, where this role may make them; grant one to the role that the aggregator or a reader connects as.
DO $$
BEGIN
    CREATE ROLE coalmine_writer NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
END
$$;
DO $$
BEGIN
    CREATE ROLE coalmine_reader NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
END
$$;
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'coalmine_writer') THEN
        GRANT SELECT, INSERT ON log_entry, log_checkpoint, evidence_blob TO coalmine_writer;
        GRANT SELECT, INSERT, UPDATE ON log_head, lease TO coalmine_writer;
        GRANT SELECT, INSERT, UPDATE, DELETE ON window_piece TO coalmine_writer;
        GRANT SELECT ON refinery_schema_history TO coalmine_writer;
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'coalmine_reader') THEN
        GRANT SELECT ON log_head, log_entry, log_checkpoint, evidence_blob, refinery_schema_history TO coalmine_reader;
    END IF;
END
$$;
