//! Conversations in, token ids and loss masks out.
//!
//! The path of the data: [`read`] takes conversations from files one by one, [`clean`] repairs or
//! drops them, [`held_out`] puts some aside, [`split`] cuts long ones, [`identity`] adds who the model
//! is, [`template`] turns each into ids and labels, [`sequences`] keeps them, [`mod@pack`] puts short ones together,
//! [`order`] decides which sequence is in which step;
//! [`prepare`] is the whole way, [`report`] what it did. Everything is a pure function of its input,
//! so that every rank computes the same.

pub mod clean;
pub mod conversation;
pub mod held_out;
pub mod identity;
pub mod language;
mod markdown;
pub mod order;
pub mod pack;
pub mod prepare;
pub mod read;
pub mod report;
pub mod sequences;
pub mod split;
pub mod template;

pub use clean::{Cleaner, Cleaning};
pub use conversation::{Conversation, Role, Turn};
pub use language::Language;
pub use order::{Cursor, Length, Mixture, Order};
pub use read::{ReadError, Reader};
pub use report::Report;
pub use sequences::{Sequences, SequencesWriter};
pub use template::{Encoder, Example, Template, TemplateError};
