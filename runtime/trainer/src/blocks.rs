//! How the state is cut: fixed blocks, the same for every number of ranks.
//!
//! Parameters form groups (the embedding, each layer, the head); a group's flattened parameters are
//! cut into equal pieces. A block is what is owned, checkpointed and sent as one; who owns
//! it is [`crate::layout`]'s.

use std::ops::Range;
use vicuna_model::lora::Lora;
use vicuna_model::{Config, layer_parameter_names, parameter_names, parameter_shape};

/// Elements in a block, at most: 4 MiB of weights, 12 MiB with both moments.
pub const BLOCK_ELEMENTS: usize = 1 << 20;

/// Group of the token embedding.
pub const EMBEDDING_GROUP: usize = 0;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    pub elements: usize,
}

impl Parameter {
    /// Norm weights and biases are not decayed: that would pull a norm to 0, not to 1.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// A piece of one parameter within a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index into [`BlockTable::parameters`].
    pub parameter: usize,
    /// First element within the parameter.
    pub offset: usize,
    pub elements: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Like `layer-3/1`.
    pub name: String,
    pub group: usize,
    pub elements: usize,
    /// In order; together the block's elements.
    pub segments: Vec<Segment>,
}

impl Block {
    /// Whether a part of the parameter is in it.
    pub fn has(&self, parameter: usize) -> bool {
        self.segments.iter().any(|segment| segment.parameter == parameter)
    }
}

/// All blocks of what is trained: a pure function of the model's configuration and the adapters'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    /// In canonical order.
    pub parameters: Vec<Parameter>,
    pub blocks: Vec<Block>,
    groups: Vec<Group>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    parameters: Range<usize>,
    blocks: Range<usize>,
}

impl BlockTable {
    /// Of what is trained: adapters, or without them the whole model.
    pub fn of(config: &Config, lora: Option<&Lora>) -> Self {
        lora.map_or_else(|| Self::new(config), |lora| Self::adapters(config, lora))
    }

    pub fn new(config: &Config) -> Self {
        Self::cut(config, BLOCK_ELEMENTS)
    }

    /// Of a model whose own weights are frozen: embedding and head have no blocks, a layer's are those
    /// of its adapters.
    pub fn adapters(config: &Config, lora: &Lora) -> Self {
        let layers = (0..config.layers).map(|layer| lora.layer_parameters(config, layer));
        let parameter = |(name, shape): (String, Vec<i64>)| Parameter {
            elements: shape.iter().product::<i64>() as usize,
            name,
            shape,
        };
        let mut table = Self::default();
        table.add_group("embedding", 0..0, BLOCK_ELEMENTS);
        for (layer, parameters) in layers.enumerate() {
            let first = table.parameters.len();
            table.parameters.extend(parameters.into_iter().map(parameter));
            table.add_group(&format!("layer-{layer}"), first..table.parameters.len(), BLOCK_ELEMENTS);
        }
        table.add_group("head", table.parameters.len()..table.parameters.len(), BLOCK_ELEMENTS);
        table
    }

    /// Bytes of the whole state in fp32, weights and two moments, as a checkpoint holds it.
    pub fn state_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| 12 * block.elements as u64).sum()
    }

    fn cut(config: &Config, block_elements: usize) -> Self {
        let parameters: Vec<Parameter> = parameter_names(config)
            .into_iter()
            .map(|name| {
                let shape = parameter_shape(config, &name).unwrap_or_default();
                let elements = shape.iter().product::<i64>() as usize;
                Parameter { name, shape, elements }
            })
            .collect();
        let mut table = Self { parameters, blocks: Vec::new(), groups: Vec::new() };
        let per_layer = layer_parameter_names(config, 0).len();
        table.add_group("embedding", 0..1, block_elements);
        for layer in 0..config.layers {
            let first = 1 + layer * per_layer;
            table.add_group(&format!("layer-{layer}"), first..first + per_layer, block_elements);
        }
        let first = 1 + config.layers * per_layer;
        table.add_group("head", first..table.parameters.len(), block_elements);
        table
    }

    fn add_group(&mut self, name: &str, parameters: Range<usize>, block_elements: usize) {
        let group = self.groups.len();
        let first_block = self.blocks.len();
        let total: usize = self.parameters[parameters.clone()].iter().map(|p| p.elements).sum();
        let pieces = total.div_ceil(block_elements);
        let size = total.div_ceil(pieces.max(1));
        for piece in 0..pieces {
            let range = piece * size..total.min((piece + 1) * size);
            self.blocks.push(Block {
                name: format!("{name}/{piece}"),
                group,
                elements: range.len(),
                segments: self.segments(parameters.clone(), range),
            });
        }
        self.groups.push(Group { parameters, blocks: first_block..self.blocks.len() });
    }

    /// Which pieces of the parameters a range of their concatenation is.
    fn segments(&self, parameters: Range<usize>, range: Range<usize>) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut start = 0;
        for parameter in parameters {
            let end = start + self.parameters[parameter].elements;
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                segments.push(Segment { parameter, offset: from - start, elements: to - from });
            }
            start = end;
        }
        segments
    }

    /// Group of layer `index`.
    pub fn layer_group(index: usize) -> usize {
        1 + index
    }

    /// Group of the final norm and, unless it is tied, the output projection.
    pub fn head_group(&self) -> usize {
        self.groups.len() - 1
    }

    /// Indexes of a group's blocks.
    pub fn group_blocks(&self, group: usize) -> Range<usize> {
        self.groups[group].blocks.clone()
    }

    /// Indexes of a group's parameters.
    pub fn group_parameters(&self, group: usize) -> Range<usize> {
        self.groups[group].parameters.clone()
    }

    pub fn elements(&self) -> usize {
        self.parameters.iter().map(|parameter| parameter.elements).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_in_exactly_one_block() {
        for block_elements in [100, 5000, BLOCK_ELEMENTS] {
            let table = BlockTable::cut(&vicuna_model::tiny::config(), block_elements);
            let mut seen: Vec<Vec<u8>> = table.parameters.iter().map(|p| vec![0; p.elements]).collect();
            for block in &table.blocks {
                assert!(block.elements <= block_elements);
                assert_eq!(block.elements, block.segments.iter().map(|s| s.elements).sum::<usize>());
                for segment in &block.segments {
                    let range = segment.offset..segment.offset + segment.elements;
                    seen[segment.parameter][range].iter_mut().for_each(|count| *count += 1);
                }
            }
            assert!(seen.iter().flatten().all(|count| *count == 1));
        }
    }

    #[test]
    fn of_adapters_only_layers_have_blocks() {
        let config = vicuna_model::tiny::config();
        let lora = Lora::new(8, 16.0, 0.0, &["q_proj", "v_proj"]).unwrap();
        let table = BlockTable::adapters(&config, &lora);
        let names: Vec<&str> = table.blocks.iter().map(|block| block.name.as_str()).collect();
        assert_eq!(names, ["layer-0/0", "layer-1/0"]);
        assert_eq!(table.elements(), 2 * 8 * (64 + 64 + 64 + 32));
        assert!(table.group_blocks(EMBEDDING_GROUP).is_empty() && table.group_blocks(table.head_group()).is_empty());
        assert_eq!(table.group_parameters(BlockTable::layer_group(1)), 4..8);
    }

    #[test]
    fn groups_are_embedding_layers_and_head() {
        let config = vicuna_model::tiny::config();
        let table = BlockTable::new(&config);
        assert_eq!(table.head_group(), config.layers + 1);
        assert_eq!(table.blocks[table.group_blocks(BlockTable::layer_group(1)).start].name, "layer-1/0");
        let head = table.group_parameters(table.head_group());
        assert_eq!(table.parameters[head.start].name, "model.norm.weight");
        assert!(!table.parameters[head.start].decays());
    }
}
