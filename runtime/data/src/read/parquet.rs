//! Parquet, row by row: a column `conversations` or `messages`, nested as in JSON or as JSON text.

use super::{Place, Problem, record};
use crate::conversation::Conversation;
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::SerializedFileReader;
use ::parquet::record::reader::RowIter;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub fn conversations(file: File) -> Result<impl Iterator<Item = Result<Conversation, Problem>>, Problem> {
    let opened = guarded(place(0), || SerializedFileReader::new(file))?;
    let mut rows: RowIter<'static> = opened.into_iter();
    let mut index = 0;
    Ok(std::iter::from_fn(move || {
        let at = place(index);
        index += 1;
        let row = guarded(at, || rows.next().transpose()).transpose()?;
        Some(row.and_then(|row| record::conversation(at, &row.to_json_value())))
    }))
}

fn place(index: usize) -> Place {
    Place { record: index + 1, line: None }
}

/// The library trusts lengths in the file in places: what it does about wrong ones must not end the program.
fn guarded<T>(at: Place, read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, Problem> {
    let failed = |detail: String| Problem::Parquet { at, detail };
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|error| failed(error.to_string())),
        Err(_) => Err(failed("its lengths contradict each other".to_owned())),
    }
}
