//! The embeddings of tokens, for sessions of a model that takes embeddings.

use crate::graph::{ConstantError, Graph};
use crate::tensor::element::{FloatElement, with_float};
use crate::tensor::{DType, Tensor};

/// The session's embeddings.
#[derive(Clone, Debug)]
pub struct Embeddings {
    width: usize,
    table: Option<Tensor>,
}

impl Embeddings {
    /// Embeddings of `width` elements, with the rows of all tokens, `[vocabulary, width]`, floats of at most 32 bits;
    /// without the table a session accepts only embeddings, not tokens. Panics if the table has another shape or type.
    pub fn new(width: usize, table: Option<Tensor>) -> Self {
        if let Some(table) = &table {
            let of_floats = table.dtype().is_float() && table.dtype() != DType::F64;
            assert!(of_floats && matches!(table.shape(), [_, columns] if *columns == width));
        }
        Embeddings { width, table }
    }

    /// The embeddings of a canonical graph; `None` if it takes token ids.
    pub fn of(graph: &Graph) -> Result<Option<Self>, ConstantError> {
        let Some(width) = graph.embedding_width() else {
            return Ok(None);
        };
        let constant = graph.embedding.and_then(|id| graph.constant(id));
        let table = constant.map(|constant| match constant.dtype() {
            DType::F64 => constant.cast(DType::F32).materialize(),
            _ => constant.materialize(),
        });
        Ok(Some(Embeddings::new(width, table.transpose()?)))
    }

    /// Elements of one embedding.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of tokens with a row; `None` without a table.
    pub fn tokens(&self) -> Option<usize> {
        self.table.as_ref().map(|table| table.shape()[0])
    }

    /// Writes the rows of tokens to `rows`, replacing its contents. The tokens must have rows.
    pub(in crate::decode) fn rows(&self, tokens: &[u32], rows: &mut Vec<f32>) {
        rows.clear();
        let Some(table) = &self.table else { return };
        for token in tokens {
            with_float!(table.dtype(), F => {
                let bytes = self.width * size_of::<F>();
                let row = &table.data()[*token as usize * bytes..][..bytes];
                rows.extend(row.chunks_exact(size_of::<F>()).map(|element| F::read(element).to_f32()));
            }, else unreachable!("checked in new"));
        }
    }
}
