//! How the state is cut: fixed blocks, the same for every number of ranks.
//!
//! Parameters form groups (the embedding, each layer, the head); a group's flattened parameters are
//! cut into equal pieces. A block is what is owned, checkpointed and sent as one; who owns
//! it is [`crate::layout`]'s.

use std::ops::Range;
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

/// All blocks of a model: a pure function of its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    pub fn new(config: &Config) -> Self {
        Self::cut(config, BLOCK_ELEMENTS)
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
        let pieces = total.div_ceil(block_elements).max(1);
        let size = total.div_ceil(pieces);
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
