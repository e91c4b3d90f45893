package resolve

import (
	"bufio"
	"errors"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// A watched file is read again when its time or size has changed; it is looked
// at once in a second at most.
type watched struct {
	path   string
	looked time.Time
	mtime  time.Time
	size   int64
}

// changed reports whether the file is to be read (again).
func (w *watched) changed() bool {
	now := time.Now()
	if !w.looked.IsZero() && now.Sub(w.looked) < time.Second {
		return false
	}
	w.looked = now
	st, err := os.Stat(w.path)
	if err != nil {
		return w.mtime.IsZero()
	}
	if st.ModTime().Equal(w.mtime) && st.Size() == w.size {
		return false
	}
	w.mtime, w.size = st.ModTime(), st.Size()
	return true
}

// hostsFile is hosts(5).
type hostsFile struct {
	path  string
	mu    sync.Mutex
	file  watched
	names map[string][]netip.Addr
}

func (h *hostsFile) lookup(host string) []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.file.path = h.path
	if h.file.changed() {
		h.names = readHosts(h.path)
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if addrs := h.names[host]; len(addrs) > 0 {
		return addrs
	}
	if host == "localhost" || strings.HasSuffix(host, ".localhost") { // RFC 6761 section 6.3
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	return nil
}

func readHosts(path string) map[string][]netip.Addr {
	names := make(map[string][]netip.Addr)
	f, err := os.Open(path)
	if err != nil {
		return names // a host without the file has no such names
	}
	defer func() { _ = f.Close() }()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		line, _, _ := strings.Cut(sc.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		addr, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		for _, name := range fields[1:] {
			name = strings.ToLower(name)
			names[name] = append(names[name], addr.Unmap())
		}
	}
	return names
}

// serversFile is resolv.conf(5).
type serversFile struct {
	path   string
	mu     sync.Mutex
	file   watched
	config *dns.ClientConfig // the last one that named a server
	err    error
}

// load returns what the file says. One that is being written, and so may say
// nothing for a moment, changes nothing.
func (s *serversFile) load() (*dns.ClientConfig, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.file.path = s.path
	if s.file.changed() {
		config, err := dns.ClientConfigFromFile(s.path)
		if err == nil && len(config.Servers) == 0 {
			err = errors.New("no name server")
		}
		if s.err = err; err == nil {
			s.config = config
		}
	}
	if s.config != nil {
		return s.config, nil
	}
	return nil, s.err
}
