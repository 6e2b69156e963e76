//! Bodies of requests as bytes: each up to a limit and within a time, and all together up to another limit, so that many clients
//! cannot fill the memory before anything is parsed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::http::StatusCode;
use futures_util::StreamExt;

use super::error::ApiError;

/// Bodies of the largest size that are held at a time.
const LARGEST_BODIES: usize = 64;

/// Of a body that is refused, the bytes that are taken off its connection: so many times the largest size. Most clients read an
/// answer only after they have written everything.
const TAKEN_OFF: usize = 16;

/// Reads bodies, and counts the bytes of those that are still held.
pub struct Bodies {
    /// Bytes of one.
    most: usize,
    /// For one to arrive.
    timeout: Duration,
    /// Bytes of further bodies.
    left: Arc<AtomicUsize>,
}

impl Bodies {
    /// Bodies of at most this many bytes, which arrive within this time.
    pub fn new(most: usize, timeout: Duration) -> Self {
        Bodies {
            most,
            timeout,
            left: Arc::new(AtomicUsize::new(most.saturating_mul(LARGEST_BODIES))),
        }
    }

    /// A body. Its bytes count until the last copy is dropped. `waits`: the client sends it only when it is asked for.
    pub async fn read(&self, body: Body, waits: bool) -> Result<Bytes, ApiError> {
        let length = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if waits && length > self.most {
            return Err(self.too_large());
        }
        self.in_time(self.collect(body)).await
    }

    /// Takes a body off its connection without keeping it.
    pub async fn discard(&self, body: Body) -> Result<(), ApiError> {
        self.in_time(self.skip(body.into_data_stream(), 0)).await
    }

    async fn collect(&self, body: Body) -> Result<Bytes, ApiError> {
        let mut held = Held {
            bytes: Vec::new(),
            counted: 0,
            left: self.left.clone(),
        };
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| broken(&error))?;
            let length = held.bytes.len() + chunk.len();
            let refused = match length > self.most {
                true => self.too_large(),
                false => match held.add(&chunk) {
                    Ok(()) => continue,
                    Err(error) => error,
                },
            };
            drop(held);
            self.skip(chunks, length).await?;
            return Err(refused);
        }
        Ok(Bytes::from_owner(held))
    }

    /// Reads the rest of a body of which `length` bytes came before.
    async fn skip(&self, mut chunks: BodyDataStream, mut length: usize) -> Result<(), ApiError> {
        while let Some(chunk) = chunks.next().await {
            length += chunk.map_err(|error| broken(&error))?.len();
            if length > self.most.saturating_mul(TAKEN_OFF) {
                return Err(self.too_large());
            }
        }
        Ok(())
    }

    fn too_large(&self) -> ApiError {
        let message = format!("the body is larger than {} bytes", self.most);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
        tokio::time::timeout(self.timeout, work).await.unwrap_or_else(|_| {
            let message = format!("the body did not arrive within {} s", self.timeout.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        })
    }
}

/// The bytes of a body that was [`Bodies::read`] before, not copied.
pub async fn read_before(body: Body) -> Result<Bytes, ApiError> {
    let bytes = axum::body::to_bytes(body, usize::MAX).await;
    bytes.map_err(|error| broken(&error))
}

fn broken(error: &axum::Error) -> ApiError {
    ApiError::bad(format!("the body did not arrive: {error}"))
}

/// Bytes that count.
struct Held {
    bytes: Vec<u8>,
    /// Bytes taken off `left`.
    counted: usize,
    left: Arc<AtomicUsize>,
}

impl Held {
    fn add(&mut self, chunk: &[u8]) -> Result<(), ApiError> {
        let take = |left: usize| left.checked_sub(chunk.len());
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        if taken.is_err() {
            let message = "the bodies of other requests take the memory that there is for bodies";
            return Err(ApiError {
                retry_after: Some(1),
                ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).code("overloaded")
            });
        }
        self.counted += chunk.len();
        if self.bytes.capacity() - self.bytes.len() < chunk.len() {
            // Twice the size, as vectors grow by themselves, would be memory that is not counted.
            self.bytes.reserve_exact(chunk.len().max(self.bytes.len() / 4));
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.left.fetch_add(self.counted, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_bodies_together_have_a_limit() {
        let bodies = Bodies::new(8, Duration::from_secs(5));
        let read = async |length: usize| bodies.read(Body::from(vec![7; length]), false).await;
        assert_eq!(read(9).await.unwrap_err().status, StatusCode::PAYLOAD_TOO_LARGE);
        let mut held = Vec::new();
        for _ in 0..LARGEST_BODIES {
            held.push(read(8).await.unwrap());
        }
        let refused = read(1).await.unwrap_err();
        assert_eq!(
            (refused.status, refused.code),
            (StatusCode::SERVICE_UNAVAILABLE, Some("overloaded"))
        );
        assert!(refused.retry_after.is_some());
        // What is only discarded is not held.
        bodies.discard(Body::from(vec![7; 8])).await.unwrap();
        bodies.discard(Body::from(vec![7; 8 * TAKEN_OFF])).await.unwrap();
        let error = bodies
            .discard(Body::from(vec![7; 8 * TAKEN_OFF + 1]))
            .await
            .unwrap_err();
        assert_eq!(error.status, StatusCode::PAYLOAD_TOO_LARGE);
        // A copy counts on.
        let copy = held[0].clone();
        held.remove(0);
        assert!(read(1).await.is_err());
        drop(copy);
        let whole = read(8).await.unwrap();
        let same = read_before(Body::from(whole.clone())).await.unwrap();
        assert_eq!((&same[..], same.as_ptr()), (&[7; 8][..], whole.as_ptr()));
    }

    #[tokio::test]
    async fn a_body_has_to_come_in_time() {
        let bodies = Bodies::new(8, Duration::from_millis(20));
        let never = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        assert_eq!(
            bodies.read(never, false).await.unwrap_err().status,
            StatusCode::REQUEST_TIMEOUT
        );
    }
}
