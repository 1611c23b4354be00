//! A safetensors file whose tensors are read and written one by one, so that no whole model need be in memory.

use crate::ModelError;
use crate::digest::WeightsHasher;
use crate::pretrained::map_file;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Bytes before the header, which say how long it is.
const PREFIX: usize = size_of::<u64>();

/// Where a tensor's bytes lie.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub file: Arc<File>,
    pub path: Arc<Path>,
    pub offset: u64,
    pub length: usize,
}

impl Place {
    pub fn read(&self) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; self.length];
        let read = self.file.read_exact_at(&mut bytes, self.offset);
        read.map_err(|source| ModelError::Read { path: self.path.to_path_buf(), source })?;
        Ok(bytes)
    }
}

/// A tensor as it is described by the header.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub place: Place,
    pub dtype: Dtype,
    pub shape: Vec<i64>,
}

impl Stored {
    /// In the precision that it is stored in, on the CPU.
    pub fn read(&self, name: &str) -> Result<Tensor, ModelError> {
        let kind = kind_of(name, self.dtype)?;
        Ok(Tensor::f_from_data_size(&self.place.read()?, &self.shape, kind)?)
    }
}

/// All that the file holds, by name; refuses one that is shorter or longer than its header says.
pub(crate) fn open(path: &Path) -> Result<BTreeMap<String, Stored>, ModelError> {
    let (start, metadata) = header(&map_file(path)?).map_err(|reason| unreadable(path, reason))?;
    let file = File::open(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })?;
    let (file, path): (_, Arc<Path>) = (Arc::new(file), path.into());
    let stored = |info: &TensorInfo| Stored {
        place: Place {
            file: file.clone(),
            path: path.clone(),
            offset: (start + info.data_offsets.0) as u64,
            length: info.data_offsets.1 - info.data_offsets.0,
        },
        dtype: info.dtype,
        shape: info.shape.iter().map(|size| *size as i64).collect(),
    };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, stored(info))).collect())
}

/// Where the tensors' bytes start, and what they are.
fn header(bytes: &[u8]) -> Result<(usize, Metadata), String> {
    let (length, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    Ok((PREFIX + length, metadata))
}

fn unreadable(path: &Path, reason: String) -> ModelError {
    ModelError::Safetensors { path: path.to_owned(), reason }
}

pub(crate) fn kind_of(name: &str, dtype: Dtype) -> Result<Kind, ModelError> {
    match dtype {
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => Err(ModelError::UnsupportedType {
            name: name.to_owned(),
            found: format!("{other:?}"),
            supported: "F32, F16 and BF16",
        }),
    }
}

/// Writes a file of which all names and shapes are known before any value is, in any order.
#[derive(Debug)]
pub struct WeightsWriter {
    path: PathBuf,
    file: File,
    start: usize,
    metadata: Metadata,
    missing: BTreeSet<String>,
}

impl WeightsWriter {
    /// Replaces the file. Of `tensors` names, precisions and shapes: bf16 is stored as it is, all else as fp32.
    pub fn create(
        path: &Path,
        tensors: impl IntoIterator<Item = (String, Kind, Vec<i64>)>,
    ) -> Result<Self, ModelError> {
        Self::of_types(path, tensors.into_iter().map(|(name, kind, shape)| (name, stored_as(kind), shape)))
    }

    /// The same in any type that the format has.
    pub(crate) fn of_types(
        path: &Path,
        tensors: impl Iterator<Item = (String, Dtype, Vec<i64>)>,
    ) -> Result<Self, ModelError> {
        let mut tensors: Vec<_> = tensors.collect();
        // In the order in which the format's own library writes them: larger alignments first, then by name.
        tensors.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let missing = tensors.iter().map(|(name, ..)| name.clone()).collect();
        let mut end = 0;
        let placed = |(name, dtype, shape): (String, Dtype, Vec<i64>)| {
            let shape: Vec<usize> = shape.into_iter().map(|size| size as usize).collect();
            let start = end;
            end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorInfo { dtype, shape, data_offsets: (start, end) })
        };
        let placed = tensors.into_iter().map(placed).collect();
        // transformers refuses files that do not say which framework wrote them.
        let format = [("format".to_owned(), "pt".to_owned())].into();
        let metadata = Metadata::new(Some(format), placed).map_err(|error| unreadable(path, error.to_string()))?;
        let header = serde_json::to_vec(&metadata).map_err(|error| unreadable(path, error.to_string()))?;
        let padded = header.len().next_multiple_of(PREFIX);
        let mut bytes = (padded as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.resize(PREFIX + padded, b' ');
        let failed = |source| ModelError::Write { path: path.to_owned(), source };
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).map_err(failed)?;
        // For whoever may read the folder, whatever the process' mask says.
        file.set_permissions(PermissionsExt::from_mode(0o644)).map_err(failed)?;
        file.write_all_at(&bytes, 0).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, start: PREFIX + padded, metadata, missing })
    }

    /// A tensor of the shape that was announced, on any device, converted to the type that it is stored in.
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<(), ModelError> {
        let info = self.announced(name)?;
        let shape: Vec<usize> = tensor.size().iter().map(|size| *size as usize).collect();
        if info.shape != shape {
            return Err(unreadable(&self.path, format!("{name} has shape {shape:?}, not {:?}", info.shape)));
        }
        let kind = kind_of(name, info.dtype)?;
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        self.write_bytes(name, &bytes)
    }

    /// Its values as they are stored.
    pub(crate) fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        let (start, end) = self.announced(name)?.data_offsets;
        if bytes.len() != end - start {
            return Err(unreadable(&self.path, format!("{name} has {} bytes, not {}", bytes.len(), end - start)));
        }
        let written = self.file.write_all_at(bytes, (self.start + start) as u64);
        written.map_err(|source| ModelError::Write { path: self.path.clone(), source })?;
        self.missing.remove(name);
        Ok(())
    }

    fn announced(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        self.metadata.info(name).ok_or_else(|| unreadable(&self.path, format!("{name} was not announced")))
    }

    /// Once all tensors are written: what [`weights_digest`](crate::weights_digest) says of them.
    pub fn finish(self) -> Result<String, ModelError> {
        if let Some(name) = self.missing.first() {
            return Err(unreadable(&self.path, format!("{name} was not written")));
        }
        let mut hasher = WeightsHasher::default();
        for (name, stored) in open(&self.path)? {
            hasher.add(&name, &stored.read(&name)?)?;
        }
        Ok(hasher.finish())
    }
}

fn stored_as(kind: Kind) -> Dtype {
    if kind == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 }
}

/// Writes all at once.
pub(crate) fn write(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<(), ModelError> {
    let described = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.kind(), tensor.size()));
    let mut writer = WeightsWriter::create(path, described)?;
    tensors.iter().try_for_each(|(name, tensor)| writer.write(name, tensor))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> BTreeMap<String, Tensor> {
        let values = |from: i64, shape: &[i64]| {
            (Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)) + from).view(shape)
        };
        BTreeMap::from([
            ("layers.10".to_owned(), values(1, &[2, 3])),
            ("layers.2".to_owned(), values(7, &[4])),
            ("a".to_owned(), values(-3, &[3, 1]).to_kind(Kind::BFloat16)),
        ])
    }

    fn described(tensors: &BTreeMap<String, Tensor>) -> Vec<(String, Kind, Vec<i64>)> {
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.kind(), tensor.size())).collect()
    }

    #[test]
    fn tensors_that_are_written_one_by_one_are_read_one_by_one() {
        let (folder, tensors) = (tempfile::tempdir().unwrap(), tensors());
        let path = folder.path().join("model.safetensors");
        let mut writer = WeightsWriter::create(&path, described(&tensors)).unwrap();
        for name in ["layers.2", "a", "layers.10"] {
            writer.write(name, &tensors[name]).unwrap();
        }
        assert_eq!(writer.finish().unwrap(), crate::weights_digest(&tensors).unwrap());
        let stored = open(&path).unwrap();
        for (name, tensor) in &tensors {
            assert_eq!(&stored[name].read(name).unwrap(), tensor, "{name}");
        }
        // The format's own library sees the same.
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("a").unwrap().dtype(), Dtype::BF16);
        assert_eq!(file.names().len(), 3);
    }

    #[test]
    fn what_was_not_announced_or_is_missing_is_refused_by_name() {
        let (folder, tensors) = (tempfile::tempdir().unwrap(), tensors());
        let path = folder.path().join("model.safetensors");
        let mut writer = WeightsWriter::create(&path, described(&tensors)).unwrap();
        let message = |result: Result<(), ModelError>| result.unwrap_err().to_string();
        assert!(message(writer.write("b", &tensors["a"])).contains("b was not announced"));
        assert!(message(writer.write("a", &tensors["layers.2"])).contains("[3, 1]"));
        writer.write("a", &tensors["a"]).unwrap();
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("layers.10 was not written"), "{error}");
    }
}
