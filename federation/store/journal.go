package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"

	"github.com/hashicorp/raft"
)

const (
	segmentSuffix = ".log"
	votesName     = "votes.json"
)

// A journal is raft's log and its votes on a disk. The entries are in memory as
// well, some thousands of them, so that nothing is read after the start; the
// files are written at their end and read once. hashicorp/raft-wal, which would
// do, cannot be written to again after a crash at the end of a segment.
//
// What the files say is what was written last: an entry takes the place of one
// with its index and of all after that, and one that does not follow the last
// takes the place of all.
type journal struct {
	files files
	dir   string
	size  int // of a segment, in bytes

	mu       sync.Mutex
	logs     []*raft.Log // without holes
	segments []segment   // the last one is written to
	active   appender    // nil: there is none
	votes    map[string][]byte
}

type segment struct {
	name string
	seq  uint64
	last uint64 // the highest index in it
	size int
}

// readJournal reads what is in dir, and writes nothing.
func readJournal(f files, dir string, size int) (*journal, error) {
	j := &journal{files: f, dir: dir, size: size, votes: make(map[string][]byte)}
	b, err := f.Read(dir, votesName)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		if j.votes, err = decodeVotes(b); err != nil {
			return nil, err
		}
	}
	names, err := f.List(dir, segmentSuffix)
	if err != nil {
		return nil, err
	}
	for i, name := range names {
		b, err := f.Read(dir, name)
		if err != nil {
			return nil, err
		}
		logs, whole, err := readSegment(b)
		if err == nil && whole < len(b) && i+1 < len(names) {
			err = errDamaged // a segment is whole before the next one is begun
		}
		s := segment{name: name, size: whole}
		if _, scanErr := fmt.Sscanf(name, "%016x"+segmentSuffix, &s.seq); err == nil && scanErr != nil {
			err = errDamaged
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for _, l := range logs {
			j.put(l)
			s.last = max(s.last, l.Index)
		}
		j.segments = append(j.segments, s)
	}
	return j, nil
}

// begin makes the journal one that can be written to. It writes anew what was
// written last: when a sync has failed the kernel may hold pages that are read
// as if they were on the disk, and are not, and never will be. raft builds upon
// what is found at the start, so it is made sure of.
func (j *journal) begin() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.votes) > 0 {
		if err := j.writeVotes(j.votes); err != nil {
			return err
		}
	}
	if len(j.segments) == 0 {
		return nil
	}
	s := &j.segments[len(j.segments)-1]
	b, err := j.files.Read(j.dir, s.name)
	if err != nil {
		return err
	}
	if len(b) < s.size {
		return fmt.Errorf("%s: %w", s.name, errDamaged)
	}
	if err := j.files.Replace(j.dir, s.name, b[:s.size]); err != nil {
		return err
	}
	j.active, err = j.files.Append(j.dir, s.name)
	return err
}

// unbegin makes the beginning of a store, if a crash has cut it short, one that
// has not been: raft writes its first term before its first entry, and takes a
// folder that has the one alone for one in use. Without an entry and without a
// vote nothing was said to anybody that must not be forgotten.
func (j *journal) unbegin() {
	if _, ok := j.votes["CurrentTerm"]; ok && len(j.votes) == 1 && len(j.logs) == 0 {
		j.votes = map[string][]byte{"CurrentTerm": make([]byte, 8)}
	}
}

// put is how an entry changes what is in memory.
func (j *journal) put(l *raft.Log) {
	if n := len(j.logs); n > 0 {
		first := j.logs[0].Index
		switch {
		case l.Index <= first, l.Index > first+uint64(n):
			j.logs = nil
		default:
			j.logs = j.logs[:l.Index-first]
		}
	}
	j.logs = append(j.logs, l)
}

// StoreLog implements [raft.LogStore].
func (j *journal) StoreLog(l *raft.Log) error { return j.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements [raft.LogStore], with one write and one sync. After an
// error the journal is to be read anew.
func (j *journal) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	copies := make([]*raft.Log, len(logs))
	for i, l := range logs {
		c := *l
		copies[i] = &c
	}
	if err := j.write(appendFrame(nil, copies)); err != nil {
		return err
	}
	s := &j.segments[len(j.segments)-1]
	for _, l := range copies {
		j.put(l)
		s.last = max(s.last, l.Index)
	}
	return nil
}

func (j *journal) write(frame []byte) error {
	if j.active == nil || j.segments[len(j.segments)-1].size+len(frame) > j.size {
		return j.next(frame)
	}
	if _, err := j.active.Write(frame); err != nil {
		return fmt.Errorf("write log: %w", err)
	}
	if err := j.active.Sync(); err != nil {
		return fmt.Errorf("sync log: %w", err)
	}
	j.segments[len(j.segments)-1].size += len(frame)
	return nil
}

// next begins a segment.
func (j *journal) next(frame []byte) error {
	var seq uint64 = 1
	if n := len(j.segments); n > 0 {
		seq = j.segments[n-1].seq + 1
	}
	s := segment{name: fmt.Sprintf("%016x%s", seq, segmentSuffix), seq: seq, size: len(frame)}
	if err := j.files.Replace(j.dir, s.name, frame); err != nil {
		return fmt.Errorf("begin segment of the log: %w", err)
	}
	active, err := j.files.Append(j.dir, s.name)
	if err != nil {
		return fmt.Errorf("open segment of the log: %w", err)
	}
	if j.active != nil {
		err = j.active.Close()
	}
	j.active, j.segments = active, append(j.segments, s)
	return err
}

// DeleteRange implements [raft.LogStore]. Entries at the end are taken out of
// memory alone: on the disk those take their place that raft stores next. Files
// go when all that is in them is before the first entry.
func (j *journal) DeleteRange(from, to uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.logs) == 0 || from > to {
		return nil
	}
	first, last := j.logs[0].Index, j.logs[len(j.logs)-1].Index
	switch {
	case to < first, from > last:
		return nil
	case from <= first && to >= last:
		j.logs = nil
	case from <= first:
		j.logs = append([]*raft.Log(nil), j.logs[to+1-first:]...) // the old array is let go
	case to >= last:
		clear(j.logs[from-first:])
		j.logs = j.logs[:from-first]
	default:
		return errors.New("entries can be deleted at either end of the log alone")
	}
	if from <= first {
		for len(j.segments) > 1 && j.segments[0].last <= to {
			if err := j.files.Remove(j.dir, j.segments[0].name); err != nil && !errors.Is(err, os.ErrNotExist) {
				break // it is tried again the next time
			}
			j.segments = j.segments[1:]
		}
	}
	return nil
}

// FirstIndex implements [raft.LogStore].
func (j *journal) FirstIndex() (uint64, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.logs) == 0 {
		return 0, nil
	}
	return j.logs[0].Index, nil
}

// LastIndex implements [raft.LogStore].
func (j *journal) LastIndex() (uint64, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.logs) == 0 {
		return 0, nil
	}
	return j.logs[len(j.logs)-1].Index, nil
}

// GetLog implements [raft.LogStore].
func (j *journal) GetLog(index uint64, l *raft.Log) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.logs) == 0 || index < j.logs[0].Index || index > j.logs[len(j.logs)-1].Index {
		return raft.ErrLogNotFound
	}
	*l = *j.logs[index-j.logs[0].Index]
	return nil
}

// IsMonotonic implements [raft.MonotonicLogStore]: after a snapshot from the
// leader raft deletes all entries rather than leave a hole.
func (j *journal) IsMonotonic() bool { return true }

// Set implements [raft.StableStore]. There are three values, that change with
// elections: one small file holds them.
func (j *journal) Set(key, value []byte) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if old, ok := j.votes[string(key)]; ok && bytes.Equal(old, value) {
		return nil // raft sets its term again at each start
	}
	votes := maps.Clone(j.votes)
	votes[string(key)] = bytes.Clone(value)
	return j.writeVotes(votes)
}

// Get implements [raft.StableStore].
func (j *journal) Get(key []byte) ([]byte, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return bytes.Clone(j.votes[string(key)]), nil
}

// SetUint64 implements [raft.StableStore].
func (j *journal) SetUint64(key []byte, value uint64) error {
	return j.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

// GetUint64 implements [raft.StableStore].
func (j *journal) GetUint64(key []byte) (uint64, error) {
	b, err := j.Get(key)
	if err != nil || len(b) == 0 {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("%s in %s has %d bytes, want 8", key, votesName, len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}

func (j *journal) writeVotes(votes map[string][]byte) error {
	b, err := json.Marshal(votes)
	if err != nil {
		return err
	}
	// Its checksum is on a line before it.
	if err := j.files.Replace(j.dir, votesName, append(fmt.Appendf(nil, "%08x\n", checksum(b)), b...)); err != nil {
		return fmt.Errorf("write %s: %w", votesName, err)
	}
	j.votes = votes
	return nil
}

func decodeVotes(b []byte) (map[string][]byte, error) {
	sum, body, _ := bytes.Cut(b, []byte("\n"))
	votes := make(map[string][]byte)
	if string(sum) != fmt.Sprintf("%08x", checksum(body)) || json.Unmarshal(body, &votes) != nil || votes == nil {
		return nil, fmt.Errorf("%s: %w", votesName, errDamaged)
	}
	return votes, nil
}

func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.active == nil {
		return nil
	}
	err := j.active.Close()
	j.active = nil
	return err
}
