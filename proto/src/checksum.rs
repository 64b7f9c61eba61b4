//! (checksum)
