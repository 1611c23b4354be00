use super::*;
use crate::tiny::{self, tiny};
use crate::{Family, RopeScaling};
use tch::Tensor;

/// Torch's engine on the CPU, for comparison.
const PLACE: Place = Place { device: Device::Cpu, kind: Kind::Float, bits: None };

fn options(precision: Precision) -> EngineOptions {
    EngineOptions { device: Device::Cpu, precision, max_length: None, cache_bytes: 1 << 20, threads: 2 }
}

fn cpu(precision: Precision) -> Engine {
    Engine::new(&tiny(3), &options(precision)).unwrap()
}

/// The engine for GPUs, on the CPU.
fn torch() -> Engine {
    let engine = cpu(Precision::Fp32);
    let adapters = adapters();
    let backend = TorchEngine::new(&tiny(3), &adapters, PLACE, engine.max_length, engine.blocks).unwrap();
    Engine { backend: Backend::Torch(Box::new(backend)), adapters: adapters.len(), ..engine }
}

/// An adapter of the tiny model.
pub fn adapter() -> Adapter {
    made(5, 3, &["q_proj", "v_proj"])
}

fn made(seed: u64, rank: usize, targets: &[&str]) -> Adapter {
    let directory = tempfile::tempdir().unwrap();
    tiny::save_adapter(directory.path(), seed, rank, targets).unwrap();
    Adapter::load(directory.path()).unwrap()
}

fn adapters() -> [Adapter; 2] {
    [adapter(), made(6, 18, &["all-linear"])]
}

fn adapted(precision: Precision) -> Engine {
    Engine::adapted(&tiny(3), &adapters(), &options(precision)).unwrap()
}

fn ids(length: u32) -> Vec<u32> {
    (0..length).map(|index| 3 + index * 37 % 280).collect()
}

/// Logits of every position by the training path.
fn reference(ids: &[u32]) -> Vec<Vec<f32>> {
    let model = tiny(3);
    let logits = crate::logits(&model.config, &model.tensors, ids).unwrap();
    (0..ids.len() as i64).map(|row| Vec::try_from(logits.get(row)).unwrap()).collect()
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits of every position, computed in pieces of these lengths.
fn in_pieces(engine: &mut Engine, ids: &[u32], blocks: &[u32], lengths: &[usize]) -> Vec<Vec<f32>> {
    let mut outputs = Outputs::default();
    let mut found = Vec::new();
    let mut past = 0;
    for length in lengths {
        let piece = Piece { tokens: &ids[past..past + length], past, blocks, want: Want::Every, adapter: None };
        engine.step(&[piece], &mut outputs).unwrap();
        found.extend(outputs.logits(0).map(|row| row.to_vec()));
        past += length;
    }
    assert_eq!(past, ids.len());
    found
}

const BLOCKS: [u32; 10] = [4, 0, 9, 17, 2, 3, 20, 6, 11, 8];

#[test]
fn cached_logits_equal_those_of_the_training_path() {
    let ids = ids(160);
    let expected = reference(&ids);
    for mut engine in [cpu(Precision::Fp32), torch()] {
        let found = in_pieces(&mut engine, &ids, &BLOCKS, &[50, 1, 1, 70, 1, 37]);
        for (position, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(difference(found, expected) < 1e-5, "at {position}");
        }
    }
}

#[test]
fn on_the_cpu_pieces_blocks_and_threads_do_not_change_a_bit() {
    let ids = ids(100);
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Int8, Precision::Int4] {
        let whole = in_pieces(&mut cpu(precision), &ids, &BLOCKS, &[100]);
        let ones = in_pieces(&mut cpu(precision), &ids, &[0, 1, 2, 3, 4, 5, 6], &[1; 100]);
        assert_eq!(whole, ones, "{precision:?}");
        let mut alone = Engine::new(&tiny(3), &EngineOptions { threads: 1, ..options(precision) }).unwrap();
        assert_eq!(whole, in_pieces(&mut alone, &ids, &BLOCKS, &[13, 30, 57]), "{precision:?}");
    }
}

#[test]
fn a_batch_computes_each_sequence_as_if_it_were_alone() {
    let prompts = [ids(3), ids(60), ids(31)];
    let tables: [&[u32]; 3] = [&[0], &[5, 1, 2, 3], &[7, 8]];
    let batch = |engine: &mut Engine| {
        let mut outputs = Outputs::default();
        let piece =
            |index: usize, tokens, past, want| Piece { tokens, past, blocks: tables[index], want, adapter: None };
        let first = [
            piece(0, &prompts[0], 0, Want::Last),
            piece(1, &prompts[1][..59], 0, Want::Nothing),
            piece(2, &prompts[2][..20], 0, Want::Nothing),
        ];
        engine.step(&first, &mut outputs).unwrap();
        let mut found: Vec<Vec<f32>> = outputs.logits(0).map(|row| row.to_vec()).collect();
        let second = [piece(1, &prompts[1][59..], 59, Want::Last), piece(2, &prompts[2][20..], 20, Want::Every)];
        engine.step(&second, &mut outputs).unwrap();
        found.extend(outputs.logits(0).map(|row| row.to_vec()));
        found.extend(outputs.logits(1).map(|row| row.to_vec()));
        found
    };
    let on_cpu = batch(&mut cpu(Precision::Int4));
    let mut alone = Vec::new();
    for (prompt, kept) in prompts.iter().zip([1, 1, 11]) {
        let rows = in_pieces(&mut cpu(Precision::Int4), prompt, &BLOCKS, &[prompt.len()]);
        alone.extend_from_slice(&rows[rows.len() - kept..]);
    }
    assert_eq!(on_cpu, alone);
    let (fp32, in_torch) = (batch(&mut cpu(Precision::Fp32)), batch(&mut torch()));
    assert!(fp32.iter().zip(&in_torch).all(|(a, b)| difference(a, b) < 1e-5));
}

/// Logits of every position of each sequence, all computed in the same steps: a piece of the prompt, then
/// token by token.
fn mixed(engine: &mut Engine, sequences: &[(Vec<u32>, Option<usize>)]) -> Vec<Vec<Vec<f32>>> {
    let tables: Vec<Vec<u32>> = (0..sequences.len() as u32).map(|index| vec![2 * index, 2 * index + 1]).collect();
    let mut found = vec![Vec::new(); sequences.len()];
    let mut outputs = Outputs::default();
    let longest = sequences.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
    for (past, end) in std::iter::once((0, 9)).chain((9..longest).map(|past| (past, past + 1))) {
        let taking: Vec<usize> = (0..sequences.len()).filter(|index| sequences[*index].0.len() > past).collect();
        let piece = |index: &usize| {
            let (ids, adapter) = &sequences[*index];
            let tokens = &ids[past..end.min(ids.len())];
            Piece { tokens, past, blocks: &tables[*index], want: Want::Every, adapter: *adapter }
        };
        let pieces: Vec<Piece<'_>> = taking.iter().map(piece).collect();
        engine.step(&pieces, &mut outputs).unwrap();
        for (piece, index) in taking.into_iter().enumerate() {
            found[index].extend(outputs.logits(piece).map(|row| row.to_vec()));
        }
    }
    found
}

fn sequences() -> Vec<(Vec<u32>, Option<usize>)> {
    [(7, Some(1)), (20, None), (20, Some(0)), (13, Some(1)), (25, Some(1)), (20, None)]
        .map(|(length, adapter)| (ids(length), adapter))
        .into()
}

/// Largest difference of an adapter's logits from those of the model that it is merged into: rounding of
/// fp32, in logits of up to 10.
const MERGED_TOLERANCE: f32 = 5e-5;

#[test]
fn an_adapter_beside_the_weights_computes_what_it_does_merged_into_them() {
    let merged = |number: usize| {
        let mut model = tiny(3);
        adapters()[number].merge_into(&mut model).unwrap();
        Engine::new(&model, &options(Precision::Fp32)).unwrap()
    };
    let base = in_pieces(&mut cpu(Precision::Fp32), &ids(30), &[0, 1], &[30]);
    for number in 0..2 {
        let expected = in_pieces(&mut merged(number), &ids(30), &[0, 1], &[30]);
        let moved = base.iter().zip(&expected).map(|(a, b)| difference(a, b)).fold(0.0, f32::max);
        assert!(moved > 0.1, "adapter {number} changes too little to be seen: {moved}");
        for mut engine in [adapted(Precision::Fp32), torch()] {
            let found =
                &mixed(&mut engine, &[(ids(12), None), (ids(30), Some(number)), (ids(30), Some(1 - number))])[1];
            let worst = found.iter().zip(&expected).map(|(a, b)| difference(a, b)).fold(0.0, f32::max);
            assert!(worst < MERGED_TOLERANCE, "adapter {number}: {worst}");
        }
    }
}

#[test]
fn a_batch_of_several_adapters_gives_each_sequence_the_bits_that_it_has_alone() {
    for precision in [Precision::Fp32, Precision::Int4] {
        let together = mixed(&mut adapted(precision), &sequences());
        for (sequence, together) in sequences().into_iter().zip(together) {
            let alone = mixed(&mut adapted(precision), std::slice::from_ref(&sequence));
            assert_eq!(alone[0], together, "{precision:?}, adapter {:?}", sequence.1);
        }
    }
    let bare = in_pieces(&mut cpu(Precision::Int4), &ids(20), &[0, 1], &[20]);
    assert_eq!(mixed(&mut adapted(Precision::Int4), &sequences())[1], bare, "adapters changed the bare model");
}

#[test]
fn adapters_of_another_model_and_unknown_ones_are_refused() {
    let other = Config { hidden: 32, ..tiny::config() };
    let message = Engine::adapted(&tiny::of_config(other, 1), &adapters(), &options(Precision::Fp32)).unwrap_err();
    let message = message.to_string();
    assert!(message.contains("another base model") && message.contains("q_proj"), "{message}");
    let piece = Piece { tokens: &[5], past: 0, blocks: &[0], want: Want::Last, adapter: Some(2) };
    let message = adapted(Precision::Fp32).step(&[piece], &mut Outputs::default()).unwrap_err().to_string();
    assert!(message.contains("no adapter 2"), "{message}");
}

#[test]
fn fewer_bits_cost_as_little_as_they_should() {
    let ids = ids(40);
    let expected = reference(&ids);
    let scale = expected.iter().flatten().fold(0.0, |largest: f32, value| largest.max(value.abs()));
    for (precision, share) in [(Precision::Bf16, 0.02), (Precision::Int8, 0.02), (Precision::Int4, 0.4)] {
        let found = in_pieces(&mut cpu(precision), &ids, &BLOCKS, &[40]);
        let worst = found.iter().zip(&expected).map(|(a, b)| difference(a, b)).fold(0.0, f32::max);
        assert!(worst > 0.0 && worst < share * scale, "{precision:?}: {worst} of {scale}");
    }
}

#[test]
fn hidden_states_are_summed_for_the_piece_that_wants_them() {
    let ids = ids(20);
    let piece = |tokens, blocks, want| Piece { tokens, past: 0, blocks, want, adapter: None };
    let sums = |mut engine: Engine| {
        let mut outputs = Outputs::default();
        let pieces = [piece(&ids[..5], &[3], Want::Last), piece(&ids, &[0, 1], Want::Hidden)];
        engine.step(&pieces, &mut outputs).unwrap();
        assert_eq!((outputs.logits(0).len(), outputs.logits(1).len(), outputs.hidden(0).len()), (1, 0, 0));
        outputs.hidden(1).to_vec()
    };
    let found = sums(cpu(Precision::Fp32));
    assert!(difference(&found, &sums(torch())) < 1e-4);
    // The head is linear: the sum's logits are the sum of the logits.
    let head = &tiny(3).tensors[crate::parameters::EMBEDDING];
    let logits = Vec::<f32>::try_from(head.matmul(&Tensor::from_slice(&found))).unwrap();
    let expected = reference(&ids).into_iter().reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect());
    assert!(difference(&logits, &expected.unwrap()) < 1e-3);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_computed() {
    let mut engine =
        Engine::new(&tiny(3), &EngineOptions { max_length: Some(10), ..options(Precision::Fp32) }).unwrap();
    let ids = ids(11);
    let mut outputs = Outputs::default();
    let mut refused = |tokens, past, blocks| {
        engine.step(&[Piece { tokens, past, blocks, want: Want::Last, adapter: None }], &mut outputs).unwrap_err()
    };
    assert!(matches!(refused(&ids, 0, &[0]), ModelError::TooLong { tokens: 11, max_length: 10 }));
    assert!(matches!(refused(&ids[..1], 10, &[0]), ModelError::TooLong { .. }));
    assert!(matches!(refused(&[], 0, &[0]), ModelError::TooLong { .. }));
    assert!(matches!(refused(&[9999], 0, &[0]), ModelError::UnknownToken { .. }));
    assert!(matches!(refused(&ids[..3], 0, &[]), ModelError::Blocks { .. }));
    assert!(matches!(refused(&ids[..3], 0, &[u32::MAX]), ModelError::Blocks { .. }));
}

#[test]
fn the_cache_holds_one_whole_sequence_however_little_memory_there_is() {
    let engine = Engine::new(&tiny(3), &EngineOptions { cache_bytes: 0, ..options(Precision::Fp32) }).unwrap();
    assert_eq!(engine.blocks() * BLOCK_TOKENS, engine.max_length());
    assert!(cpu(Precision::Fp32).blocks() > engine.blocks());
}

/// One tiny model a family and a scaling of positions.
fn relatives() -> Vec<Pretrained> {
    let base = crate::tiny::config();
    let scaled = |rope_scaling| Config { rope_scaling, max_position: 256, ..base.clone() };
    let configs = [
        Config { family: Family::Qwen2, ..base.clone() },
        Config { family: Family::Mistral, sliding_window: Some(21), head_dim: 24, max_position: 256, ..base.clone() },
        scaled(RopeScaling::Linear { factor: 4.0 }),
        scaled(RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 64 }),
        scaled(RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.138,
            original: 64,
        }),
    ];
    configs.into_iter().map(|config| crate::tiny::of_config(config, 3)).collect()
}

#[test]
fn every_family_is_computed_alike_by_training_and_both_engines() {
    let ids = ids(140);
    for model in relatives() {
        let logits = crate::logits(&model.config, &model.tensors, &ids).unwrap();
        let expected: Vec<Vec<f32>> = (0..140).map(|row| Vec::try_from(logits.get(row)).unwrap()).collect();
        let on_cpu = |lengths: &[usize]| {
            let mut engine = Engine::new(&model, &options(Precision::Fp32)).unwrap();
            in_pieces(&mut engine, &ids, &BLOCKS, lengths)
        };
        let whole = on_cpu(&[140]);
        assert_eq!(whole, on_cpu(&[1; 140]), "{:?}: pieces change bits", model.config);
        assert_eq!(whole, on_cpu(&[37, 1, 1, 60, 41]), "{:?}: pieces change bits", model.config);
        let engine = Engine::new(&model, &options(Precision::Fp32)).unwrap();
        let backend = TorchEngine::new(&model, &[], PLACE, engine.max_length, engine.blocks).unwrap();
        let mut torch = Engine { backend: Backend::Torch(Box::new(backend)), ..engine };
        for found in [whole, in_pieces(&mut torch, &ids, &BLOCKS, &[50, 1, 1, 70, 1, 17])] {
            for (position, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(difference(found, expected) < 2e-5, "{:?} at {position}", model.config);
            }
        }
    }
}

#[test]
fn a_sliding_window_forgets_what_lies_before_it() {
    let config = Config { family: Family::Mistral, sliding_window: Some(5), layers: 1, ..crate::tiny::config() };
    let model = crate::tiny::of_config(config, 3);
    let mut engine = Engine::new(&model, &options(Precision::Fp32)).unwrap();
    let (mut first, mut second) = (ids(40), ids(40));
    first[20] = 7;
    second[20] = 99;
    let rows = |engine: &mut Engine, ids: &[u32]| in_pieces(engine, ids, &BLOCKS, &[40]);
    let (first, second) = (rows(&mut engine, &first), rows(&mut engine, &second));
    let differs: Vec<usize> = (0..40).filter(|row| first[*row] != second[*row]).collect();
    assert_eq!(differs, [20, 21, 22, 23, 24]);
}
