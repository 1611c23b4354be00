//! One name for one set of weights.

use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Hexadecimal BLAKE3 over all tensors in name order: the name, a zero byte, then the values as
/// little-endian fp32. Equal for trainer and worker, whatever file format lay in between.
pub fn weights_digest(tensors: &BTreeMap<String, Tensor>) -> Result<String, tch::TchError> {
    let mut hasher = WeightsHasher::default();
    tensors.iter().try_for_each(|(name, tensor)| hasher.add(name, tensor))?;
    Ok(hasher.finish())
}

/// The same of tensors that come one by one, in name order.
#[derive(Debug, Default)]
pub struct WeightsHasher {
    hasher: blake3::Hasher,
    bytes: Vec<u8>,
}

impl WeightsHasher {
    pub fn add(&mut self, name: &str, tensor: &Tensor) -> Result<(), tch::TchError> {
        self.hasher.update(name.as_bytes()).update(&[0]);
        copy_f32_bytes(tensor, &mut self.bytes)?;
        self.hasher.update(&self.bytes);
        Ok(())
    }

    pub fn finish(self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

/// The tensor's values as fp32 in row-major order, in the machine's byte order (little-endian on
/// every platform that libtorch is built for).
pub(crate) fn copy_f32_bytes(tensor: &Tensor, bytes: &mut Vec<u8>) -> Result<(), tch::TchError> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    bytes.resize(tensor.numel() * 4, 0);
    tensor.f_copy_data_u8(bytes, tensor.numel())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_names_and_little_endian_values() {
        let tensors = BTreeMap::from([
            ("b".to_owned(), Tensor::from_slice(&[1.5f32, -2.0])),
            ("a".to_owned(), Tensor::from_slice(&[0.25f32])),
        ]);
        let mut plain = b"a\0".to_vec();
        plain.extend(0.25f32.to_le_bytes());
        plain.extend(b"b\0");
        plain.extend([1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat());
        assert_eq!(weights_digest(&tensors).unwrap(), blake3::hash(&plain).to_hex().to_string());
    }
}
