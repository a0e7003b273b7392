use super::*;

fn frame_v4(
    from: [u8; 4],
    to: [u8; 4],
    ports: (u16, u16),
    sequence: u32,
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(ports.0.to_be_bytes());
    tcp.extend(ports.1.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
    tcp.extend(payload);
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((20 + tcp.len() as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(from);
    frame.extend(to);
    frame.extend(tcp);
    frame.extend([0; 4]); // Ethernet padding, which is not payload
    frame
}

fn file(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65535, 1] {
        bytes.extend(word.to_le_bytes());
    }
    for frame in frames {
        for word in [0, 0, frame.len() as u32, frame.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(frame);
    }
    bytes
}

const A: [u8; 4] = [10, 80, 1, 10];
const B: [u8; 4] = [10, 80, 2, 10];

#[test]
fn a_stream_is_put_together_from_segments_in_any_order() {
    let frames = [
        frame_v4(A, B, (40000, 15008), 99, 0x02, b""),
        frame_v4(B, A, (15008, 40000), 499, 0x12, b""),
        frame_v4(A, B, (40000, 15008), 105, 0x18, b" world"),
        frame_v4(A, B, (40000, 15008), 100, 0x18, b"hello"),
        frame_v4(A, B, (40000, 15008), 100, 0x18, b"hello"),
        frame_v4(B, A, (15008, 40000), 500, 0x18, b"answer"),
    ];
    let packets = Packets::parse(&file(&frames)).expect("a good file");
    assert_eq!(packets.total, 6);
    assert_eq!(packets.attempts_by_port(), BTreeMap::from([(15008, 1)]));
    let expected = Stream { sent: b"hello world".to_vec(), received: b"answer".to_vec(), from_start: true };
    assert_eq!(packets.streams(15008), [expected]);
    assert_eq!(packets.streams(8080), []);
}

#[test]
fn a_marker_is_found_in_any_packet() {
    let frames = [
        frame_v4(A, B, (40000, 8080), 1, 0x18, b"GET /?marker-1"),
        frame_v4(A, B, (40000, 8080), 15, 0x18, b"nothing"),
    ];
    let packets = Packets::parse(&file(&frames)).expect("a good file");
    assert_eq!(packets.with_marker("marker-1"), 1);
    assert_eq!(packets.with_marker("marker-2"), 0);
    assert_eq!(packets.segments_by_port(), BTreeMap::from([(8080, 2)]));
}

#[test]
fn a_file_that_was_cut_off_gives_what_is_whole() {
    let whole = file(&[frame_v4(A, B, (1, 2), 1, 0x18, b"x"), frame_v4(A, B, (1, 2), 2, 0x18, b"y")]);
    let packets = Packets::parse(&whole[..whole.len() - 3]).expect("a good start");
    assert_eq!(packets.segments.len(), 1);
    assert!(Packets::parse(&whole[..10]).is_err());
    assert!(Packets::parse(&[0; 64]).is_err());
}
