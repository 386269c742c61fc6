//! What the database says of aliases, generations and owners. Statements only; `store.rs` decides who may do what.

use openlora_database::{Database, Schema, Version};
use openlora_types::{AdapterSizes, Alias, Generation, InvalidField, Limits};
use serde::{Deserialize, Serialize};
use sqlx::{AnyConnection, AnyExecutor, Row, any::AnyRow, query};
use std::sync::Arc;

use crate::{error::AdapterError, sizes};

/// The tables.
pub(crate) const SCHEMA: Schema = &[Version {
    number: 1,
    name: "registry",
    sqlite: include_str!("../migrations/sqlite/0001_registry.sql"),
    postgres: include_str!("../migrations/postgres/0001_registry.sql"),
}];

const READ: &str = "read the registry";
const WRITE: &str = "write to the registry";

/// A generation as the registry knows it, without its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) generation: Generation,
    /// The sizes of the base model it was registered for; see [`base_id`].
    pub(crate) base: String,
    /// Folder of its files in the store.
    pub(crate) location: String,
    pub(crate) summary: Summary,
}

/// What is known of a generation without opening its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) sizes: Arc<AdapterSizes>,
    pub(crate) rank_max: u32,
    /// Bytes of its tensors in memory.
    pub(crate) bytes: u64,
    pub(crate) dora: bool,
    /// Names of the modules adapted, such as `q_proj`, each once.
    pub(crate) modules: Vec<String>,
}

/// Where an adapter came from, as its owner says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lineage {
    /// The adapter that training started from.
    #[serde(with = "hex")]
    pub parent: Option<Generation>,
    /// The run that made it; empty where it was not made here.
    pub training_run: String,
    /// The data it was trained on.
    pub snapshots: Vec<String>,
}

/// A generation as the 64 digits it is shown as.
mod hex {
    use openlora_types::Generation;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(id: &Option<Generation>, serializer: S) -> Result<S::Ok, S::Error> {
        match id {
            Some(id) => serializer.collect_str(id),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Generation>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| Generation::from_hex(&text).map_err(D::Error::custom)).transpose()
    }
}

impl Lineage {
    pub(crate) fn check(&self, limits: &Limits) -> Result<(), InvalidField> {
        let run = std::slice::from_ref(&self.training_run);
        check_words("lineage.training_run", if self.training_run.is_empty() { &[] } else { run }, limits)?;
        check_words("lineage.snapshots", &self.snapshots, limits)
    }
}

/// Refuses words that are too many, too long, empty or not printable.
pub(crate) fn check_words(field: &str, words: &[String], limits: &Limits) -> Result<(), InvalidField> {
    let (count, bytes) = (limits.tags_max, limits.tag_bytes_max);
    if words.len() > count {
        return Err(InvalidField::new(field, format!("has {} entries; the limit tags_max is {count}", words.len())));
    }
    let bad = |word: &String| word.is_empty() || word.len() > bytes || word.chars().any(char::is_control);
    if words.iter().any(bad) {
        let why = format!("must be 1 to {bytes} bytes (tag_bytes_max) without control characters, each entry");
        return Err(InvalidField::new(field, why));
    }
    Ok(())
}

/// An alias as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) alias: String,
    pub(crate) owner: String,
    pub(crate) created_unix_s: u64,
    pub(crate) pinned: bool,
    pub(crate) tags: Vec<String>,
    pub(crate) lineage: Lineage,
    pub(crate) current: Known,
}

/// What an owner has and may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Aliases owned.
    pub adapters: u64,
    /// Bytes in memory of what they stand for, each alias counted.
    pub bytes: u64,
    /// Bound on `adapters`; `None`: the limit `owner_adapters_max`.
    pub adapters_max: Option<u64>,
    /// Bound on `bytes`; `None`: the limit `owner_bytes_max`.
    pub bytes_max: Option<u64>,
}

/// Pinned aliases that are listed: more than any device has room for.
const PINNED_MAX: i64 = 4_096;

const RECORD: &str = "SELECT a.alias, a.owner, a.created, a.pinned, a.tags, a.lineage, g.generation, g.base, g.location, \
                      g.bytes, g.rank_max, g.dora, g.modules, g.site_sizes \
                      FROM aliases a JOIN generations g ON g.generation = a.generation ";
const KNOWN: &str = "SELECT g.generation, g.base, g.location, g.bytes, g.rank_max, g.dora, g.modules, g.site_sizes ";

fn damaged(what: &str) -> AdapterError {
    AdapterError::database(READ)(sqlx::Error::Decode(format!("{what} in it is not what this program writes").into()))
}

fn number(row: &AnyRow, column: &str) -> Result<u64, AdapterError> {
    let value: i64 = row.try_get(column).map_err(AdapterError::database(READ))?;
    u64::try_from(value).map_err(|_| damaged(column))
}

fn text(row: &AnyRow, column: &str) -> Result<String, AdapterError> {
    row.try_get(column).map_err(AdapterError::database(READ))
}

fn json<T: serde::de::DeserializeOwned>(row: &AnyRow, column: &str) -> Result<T, AdapterError> {
    serde_json::from_str(&text(row, column)?).map_err(|_| damaged(column))
}

fn known(row: &AnyRow) -> Result<Known, AdapterError> {
    let site_sizes: Vec<u8> = row.try_get("site_sizes").map_err(AdapterError::database(READ))?;
    Ok(Known {
        generation: Generation::from_hex(&text(row, "generation")?).map_err(|_| damaged("generation"))?,
        base: text(row, "base")?,
        location: text(row, "location")?,
        summary: Summary {
            sizes: Arc::new(sizes::decode(&site_sizes).ok_or_else(|| damaged("site_sizes"))?),
            rank_max: number(row, "rank_max")? as u32,
            bytes: number(row, "bytes")?,
            dora: number(row, "dora")? != 0,
            modules: json(row, "modules")?,
        },
    })
}

fn record(row: &AnyRow) -> Result<Record, AdapterError> {
    Ok(Record {
        alias: text(row, "alias")?,
        owner: text(row, "owner")?,
        created_unix_s: number(row, "created")?,
        pinned: number(row, "pinned")? != 0,
        tags: json(row, "tags")?,
        lineage: json(row, "lineage")?,
        current: known(row)?,
    })
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings and lists of them are JSON")
}

/// What `alias` stands for.
pub(crate) async fn find<'c>(db: impl AnyExecutor<'c>, alias: &str) -> Result<Option<Record>, AdapterError> {
    let sql = format!("{RECORD} WHERE a.alias = $1");
    let row = query(&sql).bind(alias).fetch_optional(db).await.map_err(AdapterError::database(READ))?;
    row.as_ref().map(record).transpose()
}

/// The first `limit` aliases after `after`, ascending: of `owner`, or everybody's.
pub(crate) async fn list(
    db: &Database,
    owner: Option<&str>,
    after: &str,
    limit: i64,
) -> Result<Vec<Record>, AdapterError> {
    let whose = if owner.is_some() { "AND a.owner = $3" } else { "" };
    let sql = format!("{RECORD} WHERE a.alias > $1 {whose} ORDER BY a.alias LIMIT $2");
    let mut statement = query(&sql).bind(after).bind(limit);
    if let Some(owner) = owner {
        statement = statement.bind(owner);
    }
    let rows = statement.fetch_all(db.reader()).await.map_err(AdapterError::database(READ))?;
    rows.iter().map(record).collect()
}

/// A generation, whoever names it.
pub(crate) async fn generation<'c>(db: impl AnyExecutor<'c>, id: Generation) -> Result<Option<Known>, AdapterError> {
    let sql = format!("{KNOWN} FROM generations g WHERE g.generation = $1");
    let row = query(&sql).bind(id.to_string()).fetch_optional(db).await.map_err(AdapterError::database(READ))?;
    row.as_ref().map(known).transpose()
}

/// `id` where `alias` stands for it or remembers it; whether it is what a pinned alias stands for now.
pub(crate) async fn remembered<'c>(
    db: impl AnyExecutor<'c>,
    alias: &str,
    id: Generation,
) -> Result<Option<(Known, String, bool)>, AdapterError> {
    let sql = format!(
        "{KNOWN}, a.owner AS owner, a.pinned AS pinned FROM generations g JOIN aliases a ON a.generation = g.generation \
         WHERE a.alias = $1 AND g.generation = $2 \
         UNION ALL {KNOWN}, a.owner AS owner, CAST(0 AS BIGINT) AS pinned FROM generations g \
         JOIN history h ON h.generation = g.generation JOIN aliases a ON a.alias = h.alias \
         WHERE h.alias = $1 AND g.generation = $2"
    );
    let statement = query(&sql).bind(alias).bind(id.to_string());
    let row = statement.fetch_optional(db).await.map_err(AdapterError::database(READ))?;
    row.as_ref().map(|row| Ok((known(row)?, text(row, "owner")?, number(row, "pinned")? != 0))).transpose()
}

/// The lineage under which an alias of `owner` (of anybody: `None`) stands for `id` or remembers it; preferably `alias`.
pub(crate) async fn lineage_of(
    db: &mut AnyConnection,
    alias: &Alias,
    id: Generation,
    owner: Option<&str>,
) -> Result<Option<Lineage>, AdapterError> {
    let whose = if owner.is_some() { "AND a.owner = $3" } else { "" };
    let sql = format!(
        "SELECT lineage FROM (\
         SELECT a.alias, a.lineage FROM aliases a WHERE a.generation = $1 {whose} \
         UNION ALL SELECT h.alias, h.lineage FROM history h JOIN aliases a ON a.alias = h.alias \
         WHERE h.generation = $1 {whose}) named ORDER BY CASE WHEN alias = $2 THEN 0 ELSE 1 END, alias LIMIT 1"
    );
    let mut statement = query(&sql).bind(id.to_string()).bind(alias.as_str());
    if let Some(owner) = owner {
        statement = statement.bind(owner);
    }
    let row = statement.fetch_optional(db).await.map_err(AdapterError::database(READ))?;
    row.as_ref().map(|row| json(row, "lineage")).transpose()
}

/// Notes that `location` is being filled, so that it is found should this process die.
pub(crate) async fn stage(db: &Database, location: &str, id: Generation, now: i64) -> Result<(), AdapterError> {
    let sql = "INSERT INTO loose_files (location, generation, staged, since) VALUES ($1, $2, 1, $3)";
    let work = async |db: &mut AnyConnection| {
        let statement = query(sql).bind(location).bind(id.to_string()).bind(now);
        statement.execute(db).await.map(drop).map_err(AdapterError::database(WRITE))
    };
    db.change("note where the adapter goes", work).await
}

/// Makes `known`'s staged files those of its generation; files that were there before become
/// loose, which is returned.
pub(crate) async fn publish(db: &mut AnyConnection, known: &Known, now: i64) -> Result<bool, AdapterError> {
    let failed = || AdapterError::database(WRITE);
    let (id, summary) = (known.generation.to_string(), &known.summary);
    query("DELETE FROM loose_files WHERE location = $1")
        .bind(&known.location)
        .execute(&mut *db)
        .await
        .map_err(failed())?;
    let sql = "INSERT INTO loose_files (location, generation, staged, since) \
               SELECT location, generation, 0, $2 FROM generations WHERE generation = $1";
    let before = query(sql).bind(&id).bind(now).execute(&mut *db).await.map_err(failed())?;
    let sql = "INSERT INTO generations (generation, base, location, bytes, rank_max, dora, modules, site_sizes, created) \
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (generation) DO UPDATE \
               SET location = excluded.location, base = excluded.base";
    let statement = query(sql).bind(&id).bind(&known.base).bind(&known.location).bind(summary.bytes as i64);
    let statement = statement.bind(i64::from(summary.rank_max)).bind(i64::from(summary.dora));
    let statement = statement.bind(to_json(&summary.modules)).bind(sizes::encode(&summary.sizes)).bind(now);
    statement.execute(db).await.map_err(failed())?;
    Ok(before.rows_affected() > 0)
}

/// Writes a new alias.
pub(crate) async fn insert(db: &mut AnyConnection, record: &Record) -> Result<(), AdapterError> {
    let sql = "INSERT INTO aliases (alias, generation, owner, pinned, created, tags, lineage) \
               VALUES ($1, $2, $3, $4, $5, $6, $7)";
    let statement = query(sql).bind(&record.alias).bind(record.current.generation.to_string()).bind(&record.owner);
    let statement = statement.bind(i64::from(record.pinned)).bind(record.created_unix_s as i64);
    let statement = statement.bind(to_json(&record.tags)).bind(to_json(&record.lineage));
    statement.execute(db).await.map_err(AdapterError::database(WRITE))?;
    Ok(())
}

/// Writes what `record` says now over what is there under its alias.
pub(crate) async fn update(db: &mut AnyConnection, record: &Record) -> Result<(), AdapterError> {
    let sql = "UPDATE aliases SET generation = $2, pinned = $3, tags = $4, lineage = $5 WHERE alias = $1";
    let statement = query(sql).bind(&record.alias).bind(record.current.generation.to_string());
    let statement = statement.bind(i64::from(record.pinned)).bind(to_json(&record.tags));
    let statement = statement.bind(to_json(&record.lineage));
    statement.execute(db).await.map_err(AdapterError::database(WRITE))?;
    Ok(())
}

/// Puts what `old` stands for before its history, which keeps `max` generations, none twice and `new` not at all.
/// Returns the generations that left it.
pub(crate) async fn remember(
    db: &mut AnyConnection,
    old: &Record,
    new: Generation,
    max: usize,
) -> Result<Vec<Generation>, AdapterError> {
    let failed = || AdapterError::database(WRITE);
    let sql = "SELECT generation, lineage FROM history WHERE alias = $1 ORDER BY place";
    let rows = query(sql).bind(&old.alias).fetch_all(&mut *db).await.map_err(AdapterError::database(READ))?;
    let mut past = vec![(old.current.generation.to_string(), to_json(&old.lineage))];
    for row in &rows {
        past.push((text(row, "generation")?, text(row, "lineage")?));
    }
    let current = new.to_string();
    past.retain(|(id, _)| *id != current);
    let dropped = past.split_off(past.len().min(max));
    query("DELETE FROM history WHERE alias = $1").bind(&old.alias).execute(&mut *db).await.map_err(failed())?;
    for (place, (id, lineage)) in past.iter().enumerate() {
        let sql = "INSERT INTO history (alias, place, generation, lineage) VALUES ($1, $2, $3, $4)";
        let statement = query(sql).bind(&old.alias).bind(place as i64).bind(id).bind(lineage);
        statement.execute(&mut *db).await.map_err(failed())?;
    }
    dropped.iter().map(|(id, _)| Generation::from_hex(id).map_err(|_| damaged("generation"))).collect()
}

/// Takes an alias and its history away; returns all generations it named.
pub(crate) async fn remove(db: &mut AnyConnection, record: &Record) -> Result<Vec<Generation>, AdapterError> {
    let named = remember(db, record, record.current.generation, 0).await?;
    let gone = query("DELETE FROM aliases WHERE alias = $1").bind(&record.alias).execute(db).await;
    gone.map_err(AdapterError::database(WRITE))?;
    Ok(named.into_iter().chain([record.current.generation]).collect())
}

/// Takes those of `ids` away that nothing names any more; their files become loose. Returns them.
pub(crate) async fn collect(
    db: &mut AnyConnection,
    ids: &[Generation],
    now: i64,
) -> Result<Vec<Generation>, AdapterError> {
    let failed = || AdapterError::database(WRITE);
    const UNNAMED: &str = "generation = $1 AND NOT EXISTS (SELECT 1 FROM aliases a WHERE a.generation = $1) \
                           AND NOT EXISTS (SELECT 1 FROM history h WHERE h.generation = $1)";
    let mut gone = Vec::new();
    for &id in ids {
        let loosen = format!(
            "INSERT INTO loose_files (location, generation, staged, since) \
             SELECT location, generation, 0, $2 FROM generations WHERE {UNNAMED}"
        );
        let found = query(&loosen).bind(id.to_string()).bind(now).execute(&mut *db).await.map_err(failed())?;
        if found.rows_affected() > 0 {
            let sql = "DELETE FROM generations WHERE generation = $1";
            query(sql).bind(id.to_string()).execute(&mut *db).await.map_err(failed())?;
            gone.push(id);
        }
    }
    Ok(gone)
}

/// Whether a pinned alias stands for `id`.
pub(crate) async fn pinned<'c>(db: impl AnyExecutor<'c>, id: Generation) -> Result<bool, AdapterError> {
    let sql = "SELECT alias FROM aliases WHERE generation = $1 AND pinned = 1 LIMIT 1";
    let row = query(sql).bind(id.to_string()).fetch_optional(db).await.map_err(AdapterError::database(READ))?;
    Ok(row.is_some())
}

async fn count<'c>(db: impl AnyExecutor<'c>, sql: &str, bind: Option<&str>) -> Result<u64, AdapterError> {
    let mut statement = query(sql);
    if let Some(value) = bind {
        statement = statement.bind(value);
    }
    number(&statement.fetch_one(db).await.map_err(AdapterError::database(READ))?, "n")
}

/// Pinned aliases, ascending; the first [`PINNED_MAX`].
pub(crate) async fn pinned_aliases<'c>(db: impl AnyExecutor<'c>) -> Result<Vec<String>, AdapterError> {
    let sql = "SELECT alias FROM aliases WHERE pinned = 1 ORDER BY alias LIMIT $1";
    let rows = query(sql).bind(PINNED_MAX).fetch_all(db).await.map_err(AdapterError::database(READ))?;
    rows.iter().map(|row| text(row, "alias")).collect()
}

/// Pinned aliases of `owner`.
pub(crate) async fn pins(db: &mut AnyConnection, owner: &str) -> Result<u64, AdapterError> {
    count(db, "SELECT COUNT(*) AS n FROM aliases WHERE owner = $1 AND pinned = 1", Some(owner)).await
}

/// All aliases.
pub(crate) async fn aliases<'c>(db: impl AnyExecutor<'c>) -> Result<u64, AdapterError> {
    count(db, "SELECT CAST(COALESCE(SUM(adapters), 0) AS BIGINT) AS n FROM owners", None).await
}

/// All generations.
pub(crate) async fn generations<'c>(db: impl AnyExecutor<'c>) -> Result<u64, AdapterError> {
    count(db, "SELECT COUNT(*) AS n FROM generations", None).await
}

/// What `owner` has and may have.
pub(crate) async fn quota<'c>(db: impl AnyExecutor<'c>, owner: &str) -> Result<Quota, AdapterError> {
    let sql = "SELECT adapters, bytes, COALESCE(adapters_max, -1) AS adapters_max, COALESCE(bytes_max, -1) AS bytes_max \
               FROM owners WHERE owner = $1";
    let row = query(sql).bind(owner).fetch_optional(db).await.map_err(AdapterError::database(READ))?;
    let Some(row) = row else { return Ok(Quota::default()) };
    let bound = |column: &str| -> Result<Option<u64>, AdapterError> {
        let value: i64 = row.try_get(column).map_err(AdapterError::database(READ))?;
        Ok(u64::try_from(value).ok())
    };
    Ok(Quota {
        adapters: number(&row, "adapters")?,
        bytes: number(&row, "bytes")?,
        adapters_max: bound("adapters_max")?,
        bytes_max: bound("bytes_max")?,
    })
}

/// Writes what `owner` has and may have.
pub(crate) async fn set_quota(db: &mut AnyConnection, owner: &str, quota: Quota) -> Result<(), AdapterError> {
    let bound = |max: Option<u64>| max.map(|max| i64::try_from(max).unwrap_or(i64::MAX));
    let sql = "INSERT INTO owners (owner, adapters, bytes, adapters_max, bytes_max) VALUES ($1, $2, $3, $4, $5) \
               ON CONFLICT (owner) DO UPDATE SET adapters = excluded.adapters, bytes = excluded.bytes, \
               adapters_max = excluded.adapters_max, bytes_max = excluded.bytes_max";
    let statement = query(sql).bind(owner).bind(quota.adapters as i64).bind(quota.bytes as i64);
    let statement = statement.bind(bound(quota.adapters_max)).bind(bound(quota.bytes_max));
    statement.execute(db).await.map_err(AdapterError::database(WRITE))?;
    Ok(())
}

/// A folder of the store that no generation names.
#[derive(Clone, Debug)]
pub(crate) struct Loose {
    pub(crate) location: String,
    pub(crate) generation: Generation,
}

/// At most `limit` loose folders that became so before `removed_before` or, still staged, before `staged_before`; those
/// after the location `after`.
pub(crate) async fn loose(
    db: &Database,
    after: &str,
    (removed_before, staged_before): (i64, i64),
    limit: i64,
) -> Result<Vec<Loose>, AdapterError> {
    let sql = "SELECT location, generation FROM loose_files WHERE location > $1 \
               AND ((staged = 0 AND since <= $2) OR (staged = 1 AND since <= $3)) ORDER BY location LIMIT $4";
    let statement = query(sql).bind(after).bind(removed_before).bind(staged_before).bind(limit);
    let rows = statement.fetch_all(db.reader()).await.map_err(AdapterError::database(READ))?;
    let loose = |row: &AnyRow| {
        let generation = Generation::from_hex(&text(row, "generation")?).map_err(|_| damaged("generation"))?;
        Ok(Loose { location: text(row, "location")?, generation })
    };
    rows.iter().map(loose).collect()
}

/// Whether `location` is loose.
pub(crate) async fn is_loose(db: &Database, location: &str) -> Result<bool, AdapterError> {
    let sql = "SELECT COUNT(*) AS n FROM loose_files WHERE location = $1";
    Ok(count(db.reader(), sql, Some(location)).await? > 0)
}

/// Forgets a loose folder whose files are gone.
pub(crate) async fn swept(db: &Database, location: &str) -> Result<(), AdapterError> {
    let location = location.to_owned();
    let work = async move |db: &mut AnyConnection| {
        let statement = query("DELETE FROM loose_files WHERE location = $1").bind(location.clone());
        statement.execute(db).await.map(drop).map_err(AdapterError::database(WRITE))
    };
    db.change("forget removed files", work).await
}
