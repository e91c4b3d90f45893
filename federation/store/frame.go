package store

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"time"

	"github.com/hashicorp/raft"
)

// A segment of the log is frames, one a batch: 4 bytes length, 4 bytes CRC-32C
// of what follows, and that many bytes of entries. Each entry has 8 bytes index,
// 8 bytes term, 1 byte type, 8 bytes time (nanoseconds since 1970, 0 for none), 4
// bytes length of its data, the data, 4 bytes length of its extensions, the
// extensions. Integers are big-endian. A batch is there whole or not at all.
const (
	frameHeader = 8
	entryHeader = 8 + 8 + 1 + 8 + 4
)

// anew is what to do about a folder that cannot be used. A voter that forgets
// what it has voted for and acknowledged must not be one meanwhile.
const anew = "restore the folder, or have another server remove this one (culvert federation remove-peer), remove the folder and start it again"

var (
	errTorn    = errors.New("frame is not whole")
	errDamaged = errors.New("the log is damaged: " + anew)
)

func appendFrame(b []byte, logs []*raft.Log) []byte {
	start := len(b)
	b = append(b, make([]byte, frameHeader)...)
	for _, l := range logs {
		b = binary.BigEndian.AppendUint64(b, l.Index)
		b = binary.BigEndian.AppendUint64(b, l.Term)
		b = append(b, byte(l.Type))
		var at uint64
		if !l.AppendedAt.IsZero() {
			at = uint64(l.AppendedAt.UnixNano())
		}
		b = binary.BigEndian.AppendUint64(b, at)
		b = appendBytes(b, l.Data)
		b = appendBytes(b, l.Extensions)
	}
	body := b[start+frameHeader:]
	binary.BigEndian.PutUint32(b[start:], uint32(len(body))) //nolint:gosec // a batch is of 256 entries of some KiB
	binary.BigEndian.PutUint32(b[start+4:], checksum(body))
	return b
}

func appendBytes(b, p []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(p))) //nolint:gosec // likewise
	return append(b, p...)
}

func checksum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

// readFrame returns the entries of the first frame and how long that is. The
// entries share b. A frame that is not whole is errTorn.
func readFrame(b []byte) (logs []*raft.Log, size int, err error) {
	if len(b) < frameHeader {
		return nil, 0, errTorn
	}
	n := int(binary.BigEndian.Uint32(b))
	if n == 0 || n > len(b)-frameHeader {
		return nil, 0, errTorn
	}
	body := b[frameHeader : frameHeader+n]
	if checksum(body) != binary.BigEndian.Uint32(b[4:]) {
		return nil, frameHeader + n, errTorn
	}
	for len(body) > 0 {
		l, rest, ok := readEntry(body)
		if !ok {
			return nil, frameHeader + n, errDamaged
		}
		logs, body = append(logs, l), rest
	}
	return logs, frameHeader + n, nil
}

func readEntry(b []byte) (l *raft.Log, rest []byte, ok bool) {
	if len(b) < entryHeader {
		return nil, nil, false
	}
	l = &raft.Log{Index: binary.BigEndian.Uint64(b), Term: binary.BigEndian.Uint64(b[8:]), Type: raft.LogType(b[16])}
	if at := binary.BigEndian.Uint64(b[17:]); at != 0 {
		l.AppendedAt = time.Unix(0, int64(at)) //nolint:gosec // the bits are kept
	}
	if l.Data, b, ok = readBytes(b[25:]); !ok {
		return nil, nil, false
	}
	if l.Extensions, b, ok = readBytes(b); !ok {
		return nil, nil, false
	}
	return l, b, sensible(l)
}

func readBytes(b []byte) (p, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint32(b))
	if n > len(b)-4 {
		return nil, nil, false
	}
	if n == 0 {
		return nil, b[4:], true
	}
	return b[4 : 4+n : 4+n], b[4+n:], true
}

// sensible keeps out entries that raft panics at.
func sensible(l *raft.Log) (ok bool) {
	if l.Index == 0 || l.Type > raft.LogConfiguration {
		return false
	}
	if l.Type == raft.LogConfiguration {
		defer func() {
			if recover() != nil {
				ok = false
			}
		}()
		raft.DecodeConfiguration(l.Data)
	}
	return true
}

// readSegment returns the entries of a segment, and how long the part of it is
// that they are in: what follows is a batch that was cut short, and was never
// acknowledged. When another frame follows, it was no crash that spoiled the one
// before.
func readSegment(b []byte) (logs []*raft.Log, whole int, err error) {
	for whole < len(b) {
		batch, n, err := readFrame(b[whole:])
		switch {
		case err == nil:
			logs, whole = append(logs, batch...), whole+n
			continue
		case errors.Is(err, errDamaged):
			return nil, 0, err
		case n > 0:
			if _, _, err := readFrame(b[whole+n:]); err == nil {
				return nil, 0, errDamaged
			}
		}
		break
	}
	return logs, whole, nil
}
