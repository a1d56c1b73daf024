//! The statements of the entity tables, and reading their answers.

use std::collections::HashMap;
use std::ops::Bound;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use scylla::client::session::Session;
use scylla::errors::PrepareError;
use scylla::response::query_result::QueryResult;
use scylla::serialize::SerializationError;
use scylla::serialize::row::{RowSerializationContext, SerializeRow};
use scylla::serialize::writers::RowWriter;
use scylla::statement::prepared::PreparedStatement;

use super::schema::name;
use crate::engine::{ReadError, Row, Scan, Table};
use crate::stamp::Stamp;

/// The most rows that one answer of the store brings.
pub(super) const PAGE_ROWS: usize = 1000;

/// Which end of a scan is bounded, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum End {
    Open,
    Included,
    Excluded,
}

impl End {
    fn of(bound: &Bound<Bytes>) -> Self {
        match bound {
            Bound::Unbounded => Self::Open,
            Bound::Included(_) => Self::Included,
            Bound::Excluded(_) => Self::Excluded,
        }
    }
}

/// A scan's statement: bounds that are not there are not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    table: Table,
    from: End,
    to: End,
    reverse: bool,
}

impl Shape {
    fn of(scan: &Scan) -> Self {
        Self { table: scan.table, from: End::of(&scan.from), to: End::of(&scan.to), reverse: scan.reverse }
    }

    fn text(self, keyspace: &str) -> String {
        let from = match self.from {
            End::Open => "",
            End::Included => " AND place >= ?",
            End::Excluded => " AND place > ?",
        };
        let to = match self.to {
            End::Open => "",
            End::Included => " AND place <= ?",
            End::Excluded => " AND place < ?",
        };
        let order = if self.reverse { "DESC" } else { "ASC" };
        format!(
            "SELECT place, value, WRITETIME(value) FROM {keyspace}.{} WHERE partition = ?{from}{to} ORDER BY place {order} LIMIT ?",
            name(self.table)
        )
    }
}

/// The values of a scan's statement.
pub(super) struct ScanValues<'a>(pub(super) &'a Scan);

impl SerializeRow for ScanValues<'_> {
    fn serialize(
        &self,
        ctx: &RowSerializationContext<'_>,
        writer: &mut RowWriter<'_>,
    ) -> Result<(), SerializationError> {
        let scan = self.0;
        let partition = &scan.partition[..];
        let limit = i32::try_from(scan.limit).unwrap_or(i32::MAX);
        let place = |bound: &'_ Bound<Bytes>| match bound {
            Bound::Unbounded => None,
            Bound::Included(place) | Bound::Excluded(place) => Some(place.clone()),
        };
        match (place(&scan.from), place(&scan.to)) {
            (None, None) => (partition, limit).serialize(ctx, writer),
            (Some(one), None) | (None, Some(one)) => (partition, &one[..], limit).serialize(ctx, writer),
            (Some(from), Some(to)) => (partition, &from[..], &to[..], limit).serialize(ctx, writer),
        }
    }

    fn is_empty(&self) -> bool {
        false
    }
}

/// The values of one row's write.
pub(super) enum WriteValues<'a> {
    Put { partition: &'a [u8], place: &'a [u8], value: &'a [u8], stamp: Stamp },
    Delete { partition: &'a [u8], place: &'a [u8], stamp: Stamp },
}

/// A stamp as the store takes it: it is under 2^50.
pub(super) fn timestamp(stamp: Stamp) -> i64 {
    i64::try_from(stamp.as_u64()).unwrap_or(i64::MAX)
}

impl SerializeRow for WriteValues<'_> {
    fn serialize(
        &self,
        ctx: &RowSerializationContext<'_>,
        writer: &mut RowWriter<'_>,
    ) -> Result<(), SerializationError> {
        match *self {
            Self::Put { partition, place, value, stamp } => {
                (partition, place, value, timestamp(stamp)).serialize(ctx, writer)
            }
            Self::Delete { partition, place, stamp } => {
                (timestamp(stamp), partition, place).serialize(ctx, writer)
            }
        }
    }

    fn is_empty(&self) -> bool {
        false
    }
}

/// The statements of one table.
struct OfTable {
    put: PreparedStatement,
    delete: PreparedStatement,
    drop: PreparedStatement,
    get: PreparedStatement,
}

/// The prepared statements of every entity table.
pub(super) struct Statements {
    keyspace: String,
    tables: Vec<OfTable>,
    /// Made when first asked for; as many as there are shapes.
    scans: Mutex<HashMap<Shape, PreparedStatement>>,
}

impl Statements {
    pub(super) async fn prepare(session: &Session, keyspace: &str) -> Result<Self, PrepareError> {
        let mut tables = Vec::with_capacity(Table::ALL.len());
        for table in Table::ALL {
            let name = format!("{keyspace}.{}", name(table));
            let ready = async |text: String| {
                let mut prepared = session.prepare(text).await?;
                // The same bytes under the same stamp, however often.
                prepared.set_is_idempotent(true);
                Ok::<_, PrepareError>(prepared)
            };
            let mut get = ready(format!(
                "SELECT value, WRITETIME(value) FROM {name} WHERE partition = ? AND place = ?"
            ))
            .await?;
            get.set_use_cached_result_metadata(true);
            tables.push(OfTable {
                put: ready(format!(
                    "INSERT INTO {name} (partition, place, value) VALUES (?, ?, ?) USING TIMESTAMP ?"
                ))
                .await?,
                delete: ready(format!(
                    "DELETE FROM {name} USING TIMESTAMP ? WHERE partition = ? AND place = ?"
                ))
                .await?,
                drop: ready(format!("DELETE FROM {name} USING TIMESTAMP ? WHERE partition = ?")).await?,
                get,
            });
        }
        Ok(Self { keyspace: keyspace.to_owned(), tables, scans: Mutex::default() })
    }

    pub(super) fn put(&self, table: Table) -> PreparedStatement {
        self.tables[table as usize].put.clone()
    }

    pub(super) fn delete(&self, table: Table) -> PreparedStatement {
        self.tables[table as usize].delete.clone()
    }

    pub(super) fn drop(&self, table: Table) -> PreparedStatement {
        self.tables[table as usize].drop.clone()
    }

    pub(super) fn get(&self, table: Table) -> &PreparedStatement {
        &self.tables[table as usize].get
    }

    pub(super) async fn scan(
        &self,
        session: &Session,
        scan: &Scan,
    ) -> Result<PreparedStatement, PrepareError> {
        let shape = Shape::of(scan);
        let known = self.scans.lock().unwrap_or_else(PoisonError::into_inner).get(&shape).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let mut prepared = session.prepare(shape.text(&self.keyspace)).await?;
        prepared.set_is_idempotent(true);
        prepared.set_page_size(PAGE_ROWS as i32);
        prepared.set_use_cached_result_metadata(true);
        self.scans.lock().unwrap_or_else(PoisonError::into_inner).insert(shape, prepared.clone());
        Ok(prepared)
    }
}

fn stamp(writetime: Option<i64>) -> Result<Stamp, ReadError> {
    writetime.and_then(|n| u64::try_from(n).ok()).map(Stamp::from_u64).ok_or(ReadError::Damaged)
}

/// The rows of a scan's answer.
pub(super) fn rows(answer: QueryResult, into: &mut Vec<Row>) -> Result<(), ReadError> {
    let answer = answer.into_rows_result().map_err(|_| ReadError::Damaged)?;
    for row in answer.rows::<(Bytes, Bytes, Option<i64>)>().map_err(|_| ReadError::Damaged)? {
        let (clustering, value, writetime) = row.map_err(|_| ReadError::Damaged)?;
        into.push(Row { clustering, stamp: stamp(writetime)?, value });
    }
    Ok(())
}

/// The row of a read by key.
pub(super) fn row(answer: QueryResult, clustering: &Bytes) -> Result<Option<Row>, ReadError> {
    let answer = answer.into_rows_result().map_err(|_| ReadError::Damaged)?;
    let found = answer.maybe_first_row::<(Bytes, Option<i64>)>().map_err(|_| ReadError::Damaged)?;
    let Some((value, writetime)) = found else { return Ok(None) };
    Ok(Some(Row { clustering: clustering.clone(), stamp: stamp(writetime)?, value }))
}

/// Whether a conditional write was done: the column of that name, since its answer has as many columns as it likes.
pub(super) fn applied(answer: QueryResult) -> Result<bool, ReadError> {
    use scylla::value::{CqlValue, Row as CqlRow};
    let answer = answer.into_rows_result().map_err(|_| ReadError::Damaged)?;
    let at = answer.column_specs().iter().position(|c| c.name() == "[applied]").ok_or(ReadError::Damaged)?;
    let row = answer.first_row::<CqlRow>().map_err(|_| ReadError::Damaged)?;
    match row.columns.get(at) {
        Some(Some(CqlValue::Boolean(applied))) => Ok(*applied),
        _ => Err(ReadError::Damaged),
    }
}
