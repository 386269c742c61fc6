-- The registry of adapters. Generations and times are text and seconds since 1970; flags are 0 or 1.

-- What an alias stands for or remembers. 'location' is the folder of its files in the store.
CREATE TABLE generations (
    generation TEXT NOT NULL PRIMARY KEY,
    base TEXT NOT NULL,
    location TEXT NOT NULL UNIQUE,
    bytes BIGINT NOT NULL,
    rank_max BIGINT NOT NULL,
    dora BIGINT NOT NULL,
    modules TEXT NOT NULL,
    site_sizes BLOB NOT NULL,
    created BIGINT NOT NULL
);

-- 'tags' is a JSON list, 'lineage' a JSON object: where what the alias stands for came from.
CREATE TABLE aliases (
    alias TEXT NOT NULL PRIMARY KEY,
    generation TEXT NOT NULL REFERENCES generations (generation),
    owner TEXT NOT NULL,
    pinned BIGINT NOT NULL,
    created BIGINT NOT NULL,
    tags TEXT NOT NULL,
    lineage TEXT NOT NULL
);
CREATE INDEX aliases_by_owner ON aliases (owner, alias);
CREATE INDEX aliases_by_generation ON aliases (generation);
CREATE INDEX aliases_pinned ON aliases (alias) WHERE pinned = 1;

-- What an alias stood for before: place 0 is the latest.
CREATE TABLE history (
    alias TEXT NOT NULL,
    place BIGINT NOT NULL,
    generation TEXT NOT NULL REFERENCES generations (generation),
    lineage TEXT NOT NULL,
    PRIMARY KEY (alias, place)
);
CREATE INDEX history_by_generation ON history (generation);

-- What each owner has: aliases, and bytes of what they stand for. The bounds are NULL where the configured ones hold.
CREATE TABLE owners (
    owner TEXT NOT NULL PRIMARY KEY,
    adapters BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    adapters_max BIGINT,
    bytes_max BIGINT
);

-- Folders of the store that no generation names: on their way in (staged = 1), or to be removed.
CREATE TABLE loose_files (
    location TEXT NOT NULL PRIMARY KEY,
    generation TEXT NOT NULL,
    staged BIGINT NOT NULL,
    since BIGINT NOT NULL
);
