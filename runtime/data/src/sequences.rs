//! Sequences of token ids, most of which are on disk: a file of a gigabyte is trained on in a part of that.
//!
//! Ids and what is learned of them are written, one sequence after the other, into a file without a name, which is gone
//! with the process; in memory is where each begins, and packing moves nothing but that. A sequence is read when it is
//! wanted, by a plain read: pages of a mapping would count as the process's own.

use crate::template::Example;
use std::fs::File;
use std::io::{BufWriter, Error, ErrorKind, Result, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Numbers on disk are 32 bits, little-endian.
const WORD: usize = size_of::<u32>();

/// Where one sequence is and what may be asked of it without reading it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// In words from the start of the file: its ids, then the bounds of each range that is learned.
    at: u64,
    ids: u32,
    learned: u32,
    trained_tokens: u32,
}

/// Rows of token ids by number, from 0: a sequence each, or several where they are packed.
#[derive(Debug)]
pub struct Sequences {
    file: File,
    entries: Vec<Entry>,
    /// Where in `entries` each row ends; none where each is a row by itself.
    row_ends: Option<Vec<u32>>,
}

impl Sequences {
    pub fn len(&self) -> usize {
        self.row_ends.as_ref().map_or(self.entries.len(), Vec::len)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `number`, which is one of these. Fails where the scratch folder's disk does.
    pub fn read(&self, number: usize) -> Result<Example> {
        let mut sequences = self.row(number).iter().map(|entry| self.sequence(entry)).collect::<Result<Vec<_>>>()?;
        match sequences.len() {
            1 => Ok(sequences.remove(0)),
            _ => Ok(Example::together(sequences.into_iter()).unwrap_or_default()),
        }
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = Result<Example>> {
        (0..self.len()).map(|number| self.read(number))
    }

    /// Tokens of a row; 0 of one that is not there.
    pub fn tokens(&self, number: usize) -> usize {
        self.row(number).iter().map(|entry| entry.ids as usize).sum()
    }

    /// Tokens of a row whose prediction is learned.
    pub fn trained_tokens(&self, number: usize) -> usize {
        self.row(number).iter().map(|entry| entry.trained_tokens as usize).sum()
    }

    /// Tokens of the longest row; 0 if there is none.
    pub fn longest(&self) -> usize {
        (0..self.len()).map(|number| self.tokens(number)).max().unwrap_or(0)
    }

    /// Bytes that they take in memory.
    pub fn bytes(&self) -> u64 {
        let rows = self.row_ends.as_ref().map_or(0, |ends| ends.capacity() * size_of::<u32>());
        (self.entries.capacity() * size_of::<Entry>() + rows) as u64
    }

    fn row(&self, number: usize) -> &[Entry] {
        let range = match &self.row_ends {
            None => number..number + 1,
            Some(ends) => {
                let start = number.checked_sub(1).and_then(|before| ends.get(before)).map_or(0, |end| *end as usize);
                start..ends.get(number).map_or(start, |end| *end as usize)
            }
        };
        self.entries.get(range).unwrap_or_default()
    }

    fn sequence(&self, entry: &Entry) -> Result<Example> {
        let (ids, learned) = (entry.ids as usize, 2 * entry.learned as usize);
        let mut bytes = vec![0; (ids + learned) * WORD];
        self.file.read_exact_at(&mut bytes, entry.at * WORD as u64)?;
        let mut words = bytes.chunks_exact(WORD).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        let ids = words.by_ref().take(ids).collect();
        let mut learned = Vec::with_capacity(entry.learned as usize);
        while let Some((start, end)) = words.next().zip(words.next()) {
            learned.push(Range { start, end });
        }
        Ok(Example { ids, learned, ends: Vec::new() })
    }
}

/// Sequences while they are made.
#[derive(Debug)]
pub struct SequencesWriter {
    file: BufWriter<File>,
    entries: Vec<Entry>,
    words: u64,
    row_ends: Option<Vec<u32>>,
}

impl SequencesWriter {
    /// In a file without a name in this folder, which is made if it is not there.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let file = BufWriter::with_capacity(1 << 20, tempfile::tempfile_in(folder)?);
        Ok(Self { file, entries: Vec::new(), words: 0, row_ends: None })
    }

    /// Number of rows, or of sequences while none are packed.
    pub fn rows(&self) -> usize {
        self.row_ends.as_ref().map_or(self.entries.len(), Vec::len)
    }

    /// Adds a single sequence.
    pub fn push(&mut self, sequence: &Example) -> Result<()> {
        let too_long = |_| Error::new(ErrorKind::FileTooLarge, "a sequence has more than 2^32 tokens");
        let [ids, learned, trained_tokens] =
            [sequence.ids.len(), sequence.learned.len(), sequence.trained_tokens()].map(u32::try_from);
        let (ids, learned, trained_tokens) =
            (ids.map_err(too_long)?, learned.map_err(too_long)?, trained_tokens.map_err(too_long)?);
        self.entries.push(Entry { at: self.words, ids, learned, trained_tokens });
        self.words += u64::from(ids) + 2 * u64::from(learned);
        let bounds = sequence.learned.iter().flat_map(|learned| [learned.start, learned.end]);
        for word in sequence.ids.iter().copied().chain(bounds) {
            self.file.write_all(&word.to_le_bytes())?;
        }
        Ok(())
    }

    /// Puts all sequences since it was last called together into rows of at most `room` tokens.
    pub fn pack(&mut self, room: usize) {
        let ends = self.row_ends.get_or_insert_default();
        let before = ends.last().map_or(0, |end| *end as usize);
        let lengths: Vec<u32> = self.entries[before..].iter().map(|entry| entry.ids).collect();
        let rows = crate::pack::rows(&lengths, room);
        let mut end = before as u32;
        ends.extend(rows.iter().map(|row| {
            end += row.len() as u32;
            end
        }));
        let ordered: Vec<Entry> = rows.iter().flatten().map(|index| self.entries[before + *index as usize]).collect();
        self.entries.splice(before.., ordered);
    }

    pub fn finish(mut self) -> Result<Sequences> {
        self.entries.shrink_to_fit();
        let file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        Ok(Sequences { file, entries: self.entries, row_ends: self.row_ends })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(number: u32, learned: Range<u32>, length: u32) -> Example {
        let learned = std::iter::once(learned).collect();
        Example { ids: (0..length).map(|token| number * 1000 + token).collect(), learned, ends: Vec::new() }
    }

    fn written(sequences: &[Example], room: Option<usize>) -> Sequences {
        let mut writer = SequencesWriter::create(&std::env::temp_dir()).unwrap();
        sequences.iter().for_each(|sequence| writer.push(sequence).unwrap());
        if let Some(room) = room {
            writer.pack(room);
        }
        writer.finish().unwrap()
    }

    fn all(sequences: &Sequences) -> Vec<Example> {
        sequences.iter().collect::<Result<_>>().unwrap()
    }

    #[test]
    fn what_was_written_is_read_by_its_number() {
        let two = Example { ids: vec![u32::MAX, 0, 7], learned: vec![0..1, 2..3], ends: Vec::new() };
        let given = [sequence(1, 2..5, 5), two, Example::default()];
        let kept = written(&given, None);
        assert_eq!((all(&kept), kept.len(), kept.longest()), (given.to_vec(), 3, 5));
        for (number, example) in given.iter().enumerate() {
            assert_eq!(kept.tokens(number), example.ids.len());
            assert_eq!(kept.trained_tokens(number), example.trained_tokens());
        }
        assert!(written(&[], None).is_empty());
    }

    #[test]
    fn sequences_fill_rows_and_what_is_learned_goes_with_them() {
        let lengths = [7, 2, 3, 5, 12];
        let given: Vec<_> =
            lengths.into_iter().zip(0..).map(|(length, number)| sequence(number, length / 2..length, length)).collect();
        let packed = written(&given, Some(10));
        let rows = all(&packed);
        let of = |row: &Example| row.ids.iter().map(|id| id / 1000).collect::<Vec<_>>();
        let expected = [[[0; 7].to_vec(), [2; 3].to_vec()].concat(), [[1; 2].to_vec(), [3; 5].to_vec()].concat()];
        assert_eq!(rows.iter().map(of).collect::<Vec<_>>(), [&expected[..], &[[4; 12].to_vec()]].concat());
        assert_eq!(rows[0].lengths().collect::<Vec<_>>(), [7, 3]);
        assert_eq!(rows[0].learned, [3..7, 8..10]);
        assert_eq!(rows[2].lengths().collect::<Vec<_>>(), [12]);
        assert!(rows[2].ends.is_empty());
        assert_eq!((0..3).map(|row| packed.tokens(row)).collect::<Vec<_>>(), [10, 7, 12]);
        assert!((0..3).all(|row| packed.trained_tokens(row) == rows[row].trained_tokens()));
    }

    #[test]
    fn the_first_token_of_a_packed_sequence_is_not_learned_from_the_one_before_it() {
        let packed = written(&[sequence(0, 0..4, 4), sequence(0, 0..3, 3)], Some(8));
        let row = packed.read(0).unwrap();
        assert_eq!(row.learned, [0..4, 5..7]);
        assert_eq!((row.trained_tokens(), packed.trained_tokens(0)), (3 + 2, 3 + 2));
    }

    #[test]
    fn datasets_are_packed_each_by_itself() {
        let mut writer = SequencesWriter::create(&std::env::temp_dir()).unwrap();
        for number in 0..2 {
            writer.push(&sequence(number, 0..2, 2)).unwrap();
            writer.push(&sequence(number, 0..2, 2)).unwrap();
            writer.pack(6);
            assert_eq!(writer.rows(), number as usize + 1);
        }
        let rows = all(&writer.finish().unwrap());
        assert_eq!(rows.iter().map(|row| row.ids[2] / 1000).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn in_memory_is_where_they_are_alone() {
        let long = sequence(0, 0..100, 50_000);
        assert_eq!(written(&[long.clone(), long], None).bytes(), 2 * size_of::<Entry>() as u64);
    }
}
