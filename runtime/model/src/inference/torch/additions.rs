//! What adapters add to a projection, unmerged. All adapters lie side by side: every row meets all of
//! them, and what is not its own is multiplied by zero. So a step of any mixture has the same few
//! operations on the same shapes, and can be recorded.

use crate::ModelError;
use crate::layers::{Projection, linear};
use crate::lora::Adapter;
use tch::{Device, Kind, Tensor};

/// R is the sum of all adapters' ranks.
#[derive(Debug)]
pub struct Additions {
    /// `A [R, in]`.
    down: Tensor,
    /// `scale · B [out, R]`.
    up: Tensor,
    /// Whose each of the R units is: `[R]`.
    owners: Tensor,
}

/// The adapter number of rows that have none.
pub const NONE: i64 = -1;

impl Additions {
    /// To a projection whose outputs are those of `parts`, with their sizes, side by side; `None` where
    /// no adapter adds anything.
    pub fn new(
        adapters: &[Adapter],
        layer: usize,
        parts: &[(Projection, i64)],
        (device, kind): (Device, Kind),
    ) -> Result<Option<Self>, ModelError> {
        let outputs: i64 = parts.iter().map(|(_, outputs)| outputs).sum();
        let (mut downs, mut ups, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for (number, adapter) in adapters.iter().enumerate() {
            let mut column = 0;
            for (part, size) in parts {
                if let Some((a, b)) = adapter.pairs.get(&part.weight_name(layer)) {
                    let rank = a.size()[0];
                    let up = Tensor::f_zeros([outputs, rank], (Kind::Float, Device::Cpu))?;
                    up.f_narrow(0, column, *size)?.f_copy_(&b.f_mul_scalar(adapter.scale)?)?;
                    downs.push(a.shallow_clone());
                    ups.push(up);
                    owners.extend(std::iter::repeat_n(number as i64, rank as usize));
                }
                column += size;
            }
        }
        if owners.is_empty() {
            return Ok(None);
        }
        let moved = |tensor: Tensor| Ok::<_, ModelError>(tensor.f_to_device(device)?.f_to_kind(kind)?.detach());
        Ok(Some(Self {
            down: moved(Tensor::f_cat(&downs, 0)?)?,
            up: moved(Tensor::f_cat(&ups, 1)?)?,
            owners: Tensor::from_slice(&owners).f_to_device(device)?,
        }))
    }

    /// For `x [rows, in]`, whose rows are for the adapters `of_rows [rows, 1]`.
    pub fn of(&self, x: &Tensor, of_rows: &Tensor) -> Tensor {
        let own = of_rows.eq_tensor(&self.owners).to_kind(x.kind());
        linear(&(linear(x, &self.down) * own), &self.up)
    }
}
