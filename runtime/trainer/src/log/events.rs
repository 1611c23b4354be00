//! Event files as TensorBoard reads them: records of `tensorflow.Event` (`core/util/event.proto`,
//! `core/framework/summary.proto`), of which scalars and texts are written here.

use super::{HeldOutLoss, Line, Step, What, record};
use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Event {
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    #[prost(int64, tag = "2")]
    pub step: i64,
    #[prost(string, optional, tag = "3")]
    pub file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    pub summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Value {
    #[prost(string, tag = "1")]
    pub tag: String,
    #[prost(float, optional, tag = "2")]
    pub simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    pub tensor: Option<StringTensor>,
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<Metadata>,
}

/// A `TensorProto` without dimensions.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct StringTensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<NoDimensions>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    strings: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct NoDimensions {}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin: Option<Plugin>,
}

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "1")]
    name: String,
}

/// `DT_STRING`
const STRING: i32 = 7;

/// A file of these lines.
pub fn file(lines: &[Line]) -> Vec<u8> {
    let mut out = Vec::new();
    let wall_time = lines.first().map_or(0.0, |line| line.time);
    let version = Event { wall_time, file_version: Some("brain.Event:2".to_owned()), ..Event::default() };
    record::append(&mut out, &version.encode_to_vec());
    for line in lines {
        let summary = Some(Summary { values: values(line) });
        let step = i64::try_from(line.step).unwrap_or(i64::MAX);
        let event = Event { wall_time: line.time, step, summary, ..Event::default() };
        record::append(&mut out, &event.encode_to_vec());
    }
    out
}

fn values(line: &Line) -> Vec<Value> {
    match &line.what {
        What::Step(step) => of_step(step),
        What::Evaluation(HeldOutLoss { evaluation_loss, .. }) => {
            evaluation_loss.map(|loss| scalar("eval/loss", loss)).into_iter().collect()
        }
    }
}

fn of_step(step: &Step) -> Vec<Value> {
    let known = [("train/loss", step.loss), ("train/grad_norm", step.gradient_norm)];
    let mut values: Vec<Value> = known.iter().filter_map(|(tag, value)| Some(scalar(tag, (*value)?))).collect();
    values.push(scalar("train/learning_rate", step.learning_rate));
    values.push(scalar("perf/tokens_per_second", step.tokens as f64 / step.seconds.max(1e-9)));
    values.push(scalar("elastic/world_size", step.ranks as f64));
    for (verb, pods) in [("left", &step.left), ("joined", &step.joined)] {
        if !pods.is_empty() {
            values.push(text(&format!("elastic/{verb}"), &pods.join(", ")));
        }
    }
    values
}

fn scalar(tag: &str, value: f64) -> Value {
    Value { tag: tag.to_owned(), simple_value: Some(value as f32), ..Value::default() }
}

fn text(tag: &str, text: &str) -> Value {
    let tensor = StringTensor { dtype: STRING, shape: Some(NoDimensions {}), strings: vec![text.as_bytes().to_vec()] };
    let plugin = Some(Plugin { name: "text".to_owned() });
    let metadata = Some(Metadata { plugin });
    Value { tag: tag.to_owned(), tensor: Some(tensor), metadata, ..Value::default() }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{evaluation, step};
    use super::*;

    /// The same lines as TensorBoard's own record writer and protobuf classes write them.
    const PEER: &str = "1800000000000000a37f4b2209000040c00b5ad6411a0d627261696e2e4576656e743a32fb110aa5b4000000000000005d0b\
        df3709000040c00b5ad64110012aa6010a110a0a747261696e2f6c6f737315000020400a160a0f747261696e2f677261645f\
        6e6f726d150000803f0a1a0a13747261696e2f6c6561726e696e675f72617465156f12833a0a1d0a16706572662f746f6b65\
        6e735f7065725f7365636f6e6415000048420a190a12656c61737469632f776f726c645f73697a6515000040400a230a0c65\
        6c61737469632f6c6566744209080712004203742d304a080a060a0474657874ba15ba301f00000000000000514b44180900\
        0000c00b5ad64110012a120a100a096576616c2f6c6f7373150000c03fbe64e09d";

    #[test]
    fn a_file_has_the_bytes_that_tensorboards_writer_writes() {
        let bytes = file(&[step(1, 2.5, 3, &["t-0"]), evaluation(1, 1.5)]);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, PEER);
    }

    #[test]
    fn a_file_starts_with_the_version_and_has_an_event_a_line() {
        let bytes = file(&[step(1, 2.5, 3, &["t-0"]), evaluation(1, 1.5)]);
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while let Some((head, tail)) = rest.split_at_checked(12) {
            let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
            events.push(Event::decode(&tail[..length]).unwrap());
            rest = &tail[length + 4..];
        }
        assert!(rest.is_empty());
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        let tags = |event: &Event| -> Vec<(String, Option<f32>)> {
            let values = &event.summary.as_ref().unwrap().values;
            values.iter().map(|value| (value.tag.clone(), value.simple_value)).collect()
        };
        let first = tags(&events[1]);
        assert_eq!(first[0], ("train/loss".to_owned(), Some(2.5)));
        assert!(first.contains(&("elastic/world_size".to_owned(), Some(3.0))));
        assert!(first.contains(&("elastic/left".to_owned(), None)));
        assert_eq!(tags(&events[2]), [("eval/loss".to_owned(), Some(1.5))]);
        assert_eq!(events[2].step, 1);
    }
}
