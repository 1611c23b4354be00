use super::*;
use crate::conversation::{Role, Turn};
use crate::identity;
use crate::template::tests::{CHATML_TOKENS, byte_tokenizer};
use crate::template::{CHATML, Template};
use tempfile::TempDir;

fn encoder() -> Encoder {
    Template::named(CHATML).unwrap().bind(&byte_tokenizer(&CHATML_TOKENS)).unwrap()
}

fn prepare(
    sources: &[Source],
    added: &[Conversation],
    settings: &Settings,
    encoder: &Encoder,
) -> Result<Prepared, PrepareError> {
    super::prepare(sources, added, settings, encoder, &std::env::temp_dir())
}

fn all(sequences: &Sequences) -> Vec<Example> {
    sequences.iter().collect::<Result<_, _>>().unwrap()
}

fn settings() -> Settings {
    Settings { clean: false, language: None, split_at: None, hold_out: 0.0, max_length: 1000, pack: false }
}

fn conversation(name: &str, pairs: usize) -> Conversation {
    let pair = |index| [Turn::user(format!("question {index} of {name}")), Turn::assistant(format!("answer {index}"))];
    Conversation { id: name.to_owned(), turns: (0..pairs).flat_map(pair).collect() }
}

fn source(folder: &TempDir, name: &str, weight: f64, conversations: &[Conversation]) -> Source {
    let file = folder.path().join(name);
    let records: Vec<_> = conversations.iter().map(Conversation::to_sharegpt).collect();
    std::fs::write(&file, serde_json::to_vec(&records).unwrap()).unwrap();
    Source { name: name.to_owned(), files: vec![file], skipped: Vec::new(), weight }
}

fn many(name: &str, count: usize, pairs: usize) -> Vec<Conversation> {
    (0..count).map(|index| conversation(&format!("{name}-{index}"), pairs)).collect()
}

#[test]
fn sequences_are_numbered_through_all_sources_and_who_the_model_is_comes_last() {
    let folder = tempfile::tempdir().unwrap();
    let sources = [source(&folder, "a", 1.0, &many("a", 3, 1)), source(&folder, "b", 2.5, &many("b", 5, 1))];
    let added = identity::conversations("N", "O", 1, 4);
    let prepared = prepare(&sources, &added, &settings(), &encoder()).unwrap();
    let mixtures: Vec<_> = prepared.mixtures.iter().map(|mixture| (mixture.sequences, mixture.weight)).collect();
    assert_eq!(mixtures, [(3, 1.0), (5, 2.5), (4, 1.0)]);
    assert_eq!(prepared.examples.len(), 12);
    assert_eq!(prepared.examples.read(3).unwrap(), encoder().example(&conversation("b-0", 1).turns).unwrap());
    let encoded = prepared.report.encoded.unwrap();
    assert_eq!((encoded.sequences, encoded.cut, encoded.held_out), (12, 0, 0));
}

#[test]
fn no_piece_of_a_conversation_is_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let sources = [source(&folder, "a", 1.0, &many("a", 200, 8))];
    let settings = Settings { split_at: Some(200), hold_out: 0.1, ..settings() };
    let prepared = prepare(&sources, &[], &settings, &encoder()).unwrap();
    let tokenizer = byte_tokenizer(&CHATML_TOKENS);
    let names = |examples: &Sequences| -> std::collections::BTreeSet<String> {
        let text = |example: &Example| tokenizer.decode(&example.ids, true).unwrap();
        let name = |text: String| text.split("of ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        all(examples).iter().map(|example| name(text(example))).collect()
    };
    let (trained, held_out) = (names(&prepared.examples), names(&prepared.held_out));
    assert!(trained.is_disjoint(&held_out));
    assert_eq!(trained.len() + held_out.len(), 200);
    assert_eq!(prepared.report.held_out as usize, held_out.len());
    assert!((5..45).contains(&held_out.len()), "{}", held_out.len());
    let split = prepared.report.split.unwrap();
    assert_eq!((split.conversations, split.too_long), (200, 0));
    assert_eq!(split.pieces as usize, prepared.examples.len() + prepared.held_out.len());
    assert!(prepared.examples.longest() <= 200);
}

#[test]
fn the_same_bytes_give_the_same_sequences() {
    let folder = tempfile::tempdir().unwrap();
    let sources = [source(&folder, "a", 1.0, &many("a", 50, 3)), source(&folder, "b", 0.5, &many("a", 60, 3))];
    let settings = Settings { clean: true, split_at: Some(150), hold_out: 0.2, ..settings() };
    let once = prepare(&sources, &[], &settings, &encoder()).unwrap();
    let again = prepare(&sources, &[], &settings, &encoder()).unwrap();
    let everything = |prepared: &Prepared| {
        let Prepared { examples, held_out, mixtures, digest, report, .. } = prepared;
        (all(examples), all(held_out), mixtures.clone(), digest.clone(), report.clone())
    };
    assert_eq!(everything(&once), everything(&again));
    // What b has of a is a duplicate.
    let kept: u64 = once.report.kept.conversations;
    assert_eq!((kept, once.report.dropped()), (60, 50));
}

#[test]
fn long_conversations_are_cut_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let turns = |question: String| vec![Turn::user(question), Turn::assistant("yes")];
    let short = Conversation { id: "s".into(), turns: turns("Hi".into()) };
    let long = Conversation { id: "l".into(), turns: turns("why ".repeat(40)) };
    let sources = [source(&folder, "a", 1.0, &[short, long])];
    let prepared = prepare(&sources, &[], &Settings { max_length: 60, ..settings() }, &encoder()).unwrap();
    let encoded = prepared.report.encoded.unwrap();
    assert_eq!((encoded.sequences, encoded.cut, encoded.without_reply, encoded.trained_tokens), (1, 1, 1, 4));
}

#[test]
fn a_source_that_is_put_aside_or_too_long_is_told_from_one_that_was_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let all = source(&folder, "a", 1.0, &many("a", 2, 1));
    let said =
        |settings: Settings| prepare(std::slice::from_ref(&all), &[], &settings, &encoder()).unwrap_err().to_string();
    let aside = said(Settings { hold_out: 1.0, ..settings() });
    assert!(aside.contains("2 of 2 conversations kept; 2 sequences were put aside for evaluation"), "{aside}");
    let long = said(Settings { max_length: 5, ..settings() });
    assert!(long.contains("2 have no token of a reply to learn within 5 tokens"), "{long}");
}

#[test]
fn the_digest_tells_every_token_every_label_and_what_is_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let digest = |conversations: &[Conversation], hold_out: f64| {
        let sources = [source(&folder, "a", 1.0, conversations)];
        prepare(&sources, &[], &Settings { hold_out, ..settings() }, &encoder()).unwrap().digest
    };
    let all = many("a", 40, 2);
    let mut digests = vec![digest(&all, 0.0), digest(&all[1..], 0.0), digest(&all, 0.3)];
    assert_eq!(digest(&all, 0.0), digests[0]);
    let mut other = all.clone();
    other[7].turns[2].content.push('!');
    digests.push(digest(&other, 0.0));
    let mut unlearned = all.clone();
    unlearned[7].turns[1].learned = false;
    digests.push(digest(&unlearned, 0.0));
    let mut swapped = all;
    swapped.swap(3, 4);
    digests.push(digest(&swapped, 0.0));
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), 6);
}

#[test]
fn files_that_were_not_read_are_in_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let sources = [Source { skipped: vec!["notes.csv".into()], ..source(&folder, "a", 1.0, &many("a", 2, 1)) }];
    let report = prepare(&sources, &[], &settings(), &encoder()).unwrap().report;
    assert_eq!(report.skipped_files, ["a: notes.csv"]);
    assert!(report.to_string().contains("not read        a: notes.csv"), "{report}");
}

#[test]
fn packing_moves_sequences_and_changes_none() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, pairs| source(&folder, name, 1.0, &many(name, 30, pairs));
    let sources = [of("a", 1), of("b", 3)];
    let apart = prepare(&sources, &[], &settings(), &encoder()).unwrap();
    let packed = prepare(&sources, &[], &Settings { pack: true, max_length: 400, ..settings() }, &encoder()).unwrap();
    let rows = all(&packed.examples);
    assert!(rows.len() < 30 && rows.iter().all(|row| row.ids.len() <= 400));
    let sizes: Vec<u32> = packed.mixtures.iter().map(|mixture| mixture.sequences).collect();
    assert_eq!(sizes.iter().sum::<u32>() as usize, rows.len());
    let first = |rows: &[Example]| rows.iter().map(|row| row.lengths().count()).sum::<usize>();
    let (of_a, of_b) = rows.split_at(sizes[0] as usize);
    assert_eq!((first(of_a), first(of_b)), (30, 30), "datasets do not share rows");
    let mut cut: Vec<Vec<u32>> = Vec::new();
    for row in &rows {
        let mut ids = row.ids.as_slice();
        for length in row.lengths() {
            let (one, rest) = ids.split_at(length);
            cut.push(one.to_vec());
            ids = rest;
        }
    }
    let mut whole: Vec<Vec<u32>> = all(&apart.examples).into_iter().map(|example| example.ids).collect();
    cut.sort();
    whole.sort();
    assert_eq!(cut, whole);
}

/// Manifests of running trainings have the digest: it stays what it is, however sequences are kept.
#[test]
fn the_digest_is_of_sequences_in_order_and_of_the_size_of_each_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (many("a", 20, 2), many("b", 9, 1));
    let sources = [source(&folder, "a", 1.0, &a), source(&folder, "b", 2.0, &b)];
    for (pack, sizes) in [(false, [20, 9]), (true, [5, 2])] {
        let mut hasher = blake3::Hasher::new_derive_key("vicuna-operator 2026 sequences of a training");
        let mut put = |number: usize| {
            hasher.update(&(number as u32).to_le_bytes());
        };
        for conversation in a.iter().chain(&b) {
            let Example { ids, learned, .. } = encoder().example(&conversation.turns).unwrap();
            [0, ids.len(), learned.len()].into_iter().for_each(&mut put);
            ids.iter().for_each(|id| put(*id as usize));
            learned.iter().for_each(|range| [range.start, range.end].into_iter().for_each(|at| put(at as usize)));
        }
        sizes.into_iter().for_each(&mut put);
        let settings = Settings { pack, max_length: 400, ..settings() };
        let prepared = prepare(&sources, &[], &settings, &encoder()).unwrap();
        assert_eq!(prepared.mixtures.iter().map(|it| it.sequences as usize).collect::<Vec<_>>(), sizes);
        assert_eq!(prepared.digest, hasher.finalize().to_hex().to_string());
    }
}

#[test]
fn a_source_of_which_nothing_is_left_is_an_error_that_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let question = Conversation { id: "q".into(), turns: vec![Turn::new(Role::User, "Anybody?")] };
    let error = prepare(&[source(&folder, "asked", 1.0, &[question])], &[], &settings(), &encoder()).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("asked") && said.contains("0 of 1 conversations kept; 1 dropped: last turn human"), "{said}");
    let absent =
        Source { name: "gone".into(), files: vec![folder.path().join("gone")], skipped: Vec::new(), weight: 1.0 };
    let said = prepare(&[absent], &[], &settings(), &encoder()).unwrap_err().to_string();
    assert!(said.starts_with("the dataset gone: "), "{said}");
}
