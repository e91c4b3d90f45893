package federation

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/federation/state"
)

func TestReplicaPersists(t *testing.T) {
	follows(t, stateOf(t, "S", gw1(), alice(), bob()), func(t *testing.T, x *following) {
		x.store.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		synctest.Wait()
		x.stop() // at once: what has not been written yet is
		x.w.change("alice", func(h *host) { h.down = true })
		before := x.replica.State()
		x.start()
		x.want("dc1/alice dc1/gw1 dc2/bob!")
		if s := x.replica.State(); s.Store() != "S" || s.Index() != before.Index() || s.Hash() != before.Hash() {
			t.Errorf("came up as %s at %d", s.Store(), s.Index())
		}
		if n := testutil.ToFloat64(x.metrics.entries.WithLabelValues("servers", "critical")); n != 1 {
			t.Errorf("%v critical servers are shown", n)
		}
		x.w.change("alice", func(h *host) { h.down = false })
		x.store.do(t, removal(bob().Key()))
		time.Sleep(5 * time.Second)
		x.want("dc1/alice dc1/gw1")
	})
}

// A file that cannot be read is told, and the primary has all of it.
func TestCorruptRecords(t *testing.T) {
	follows(t, stateOf(t, "S", alice()), func(t *testing.T, x *following) {
		time.Sleep(2 * time.Second)
		x.stop()
		file := filepath.Join(x.folder.path, recordsFile)
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, spoilt := range []string{"", string(b[:len(b)/2]), "{}", strings.Replace(string(b), "127.77.1.1", "::", 1)} {
			if err := os.WriteFile(file, []byte(spoilt), 0o600); err != nil {
				t.Fatal(err)
			}
			x.start()
			x.want("dc1/alice")
			if got := lines(x.logs); got != "records on disk cannot be read: starting without them" {
				t.Errorf("logged %q", got)
			}
			time.Sleep(2 * time.Second)
			x.stop()
			if now, err := os.ReadFile(file); err != nil || string(now) != string(b) {
				t.Errorf("on disk is %s, %v", now, err)
			}
		}
	})
}

// A disk that cannot be written is told once, and written once that is over.
func TestDiskFails(t *testing.T) {
	follows(t, stateOf(t, "S", alice()), func(t *testing.T, x *following) {
		time.Sleep(2 * time.Second)
		for range 2 {
			if err := os.Rename(x.folder.path, x.folder.path+".away"); err != nil {
				t.Fatal(err)
			}
			for _, version := range []string{"1", "2", "3"} {
				next := *bob().Server
				next.Version = version
				x.store.do(t, state.Command{Register: &state.Registration{Datacenter: "dc2", Server: &next}})
				time.Sleep(10 * time.Second)
			}
			if got := lines(x.logs); got != "records are not kept on disk: make room, or see to the permissions" {
				t.Errorf("logged %q", got)
			}
			if err := os.Rename(x.folder.path+".away", x.folder.path); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * saveEvery)
			if s, err := x.folder.Load(); err != nil || s.Hash() != x.replica.State().Hash() || s.Index() != x.store.State().Index() {
				t.Errorf("on disk is %d, %v", s.Index(), err)
			}
		}
		if err := os.RemoveAll(x.folder.path); err != nil {
			t.Fatal(err)
		}
		x.store.do(t, removal(bob().Key()))
		synctest.Wait()
		x.stop() // it does not wait for the disk
	})
}
