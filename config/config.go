// Package config reads what the operator writes: the HCL files of sidecars and
// gateways, checked so thoroughly that what is accepted can be run as far as
// anybody can tell without the host.
//
//	cfg, err := config.LoadSidecar("sidecar.hcl", config.Options{Env: os.LookupEnv, Hostname: os.Hostname})
//	if faults, ok := errors.AsType[config.Faults](err); ok {
//		fmt.Fprintln(os.Stderr, faults) // every fault, one a line, as file:line:column
//	}
//
// Values are literals and the functions env("NAME") and hostname(). Unknown
// keys and values of another type are faults, and so is a block too many;
// nothing is converted in silence. File names in a tls block, and the folder in
// a federation block, are relative to the folder of the configuration file.
//
// The package imports nothing of the module and keeps no state. What it
// returns is never changed by it again.
package config

import (
	"net/netip"
	"time"
)

// Sidecar is the configuration of `culvert sidecar`, with every default filled
// in.
type Sidecar struct {
	Datacenter  string
	Node        string
	Domain      string
	Server      Server
	Services    []Service // of the profile, as changed, and then the further ones
	Capture     string    // bind or redirect
	OnExit      string    // block or open; of use to redirect alone
	Listen      Listen
	TLS         TLS
	Gateways    []string // host:port, of the own datacenter
	Peers       []Peer
	Datacenters []Datacenter // every other one that has peers or a block
	Federation  *Federation  // nil where there is no block
	Admin       Admin
	Log         Log
}

// The values of Capture and OnExit.
const (
	CaptureBind     = "bind"
	CaptureRedirect = "redirect"
	OnExitBlock     = "block"
	OnExitOpen      = "open"
)

// Server is the local server.
type Server struct {
	Profile   string // consul, nomad, serf, memberlist or ""
	Address   netip.Addr
	Advertise netip.Addr
	Hairpin   bool
	TLS       bool // its port with types demands TLS
}

// Service is one port of the servers.
type Service struct {
	Name  string
	Kind  string // packet or stream
	Port  uint16
	Local netip.AddrPort
	ALPN  string // "" for none
	// Types tells that connections begin with the byte that Consul's RPC port
	// tells their kind by, so that a native server can be told by ALPN instead.
	Types bool
}

// Listen is where TLS connections are taken.
type Listen struct {
	Address     string // host:port
	Passthrough string // host:port for what is not TLS; "" closes it
	// PassthroughTLS passes TLS there too that offers no protocol of Culvert's
	// or of a native server's.
	PassthroughTLS bool
}

// TLS names the files of an identity.
type TLS struct{ CAFile, CertFile, KeyFile string }

// Peer is another server.
type Peer struct {
	Datacenter string
	Node       string
	Advertise  netip.Addr
	Address    string // host:port of its sidecar; "" where it is not needed
}

// Datacenter is another datacenter.
type Datacenter struct {
	Name     string
	Gateways []string // host:port
	// Mode is local, remote or direct. It is "" in a gateway's, and beside a
	// federation block where none is given: what leads there is not known yet.
	Mode string
}

// Federation is how datacenters find each other.
type Federation struct {
	PrimaryDatacenter string
	PrimaryGateways   []string // in a secondary: host:port, or "srv:" and the name of SRV records
	// BootstrapExpect, in the primary's sidecars, is how many begin the store
	// together: 1, 3, 5 or 7. 0 only joins a store that exists.
	BootstrapExpect int
	RetryJoin       []string // in the primary: host:port of its sidecars
	DataDir         string   // "" keeps everything in memory
	Address         string   // host:port that the own datacenter dials
	WANAddress      string   // of a gateway: host:port that other datacenters dial
	// Reap, in the primary's sidecars, is how long an entry that is no longer
	// renewed is kept.
	Reap   time.Duration
	Accept []Accept
}

// Accept bounds what the entries of a datacenter may point at. A list that is
// nil bounds nothing; none is empty.
type Accept struct {
	Datacenter string         // the own one as well: nobody else may use its ranges
	Advertise  []netip.Prefix // masked; no two datacenters' overlap
	Gateways   []netip.Prefix // masked
}

// Admin is where metrics, health and status are served.
type Admin struct{ Address string }

// Log says what is logged and how.
type Log struct {
	Level  string // debug, info, warn or error
	Format string // json, console, or "" for what suits the output
}

// Gateway is the configuration of `culvert gateway`, with every default filled
// in.
type Gateway struct {
	Datacenter  string
	Node        string
	Domain      string
	Domains     []string
	Listen      Listen
	Sidecars    []GatewaySidecar
	Datacenters []Datacenter
	TLS         TLS         // zero where there is no tls block
	Federation  *Federation // nil where there is no block; TLS is there beside it
	Admin       Admin
	Log         Log
}

// GatewaySidecar is a sidecar of the gateway's own datacenter.
type GatewaySidecar struct {
	Node    string
	Address string // host:port
	Domain  string
}

// Options are what reading a configuration needs of the process.
type Options struct {
	// Env is env("NAME"). Nil means that no variable is set.
	Env func(name string) (string, bool)
	// Hostname is hostname(). Nil is an error where it is asked for.
	Hostname func() (string, error)
	// CheckTLS checks the files of a tls block for an identity; role is
	// "server" or "gateway". Nil means unchecked.
	CheckTLS func(ca, cert, key, datacenter, node, domain, role string) []TLSProblem
	// Overrides win over the file.
	Overrides Overrides
}

// Overrides are the flags of the command line; "" leaves the file's value.
type Overrides struct{ Listen, Admin, LogLevel, LogFormat string }

// TLSProblem is what [Options.CheckTLS] finds.
type TLSProblem struct {
	Field   string // ca_file, cert_file or key_file
	Summary string
	Hint    string
}

// A Kind is what a configuration file is for.
type Kind string

// The kinds.
const (
	KindSidecar Kind = "sidecar"
	KindGateway Kind = "gateway"
)

// The ports of Culvert's own addresses where they name none.
const (
	defaultPort      = "8443"
	defaultAdminPort = "7440"
	defaultAdmin     = "127.0.0.1:7440"
)

// LoadSidecar reads the configuration of a sidecar. The error is [Faults].
func LoadSidecar(file string, o Options) (*Sidecar, error) {
	d, root, err := open(file, o)
	if err != nil {
		return nil, err
	}
	s := d.sidecar(root)
	if err := d.result(); err != nil {
		return nil, err
	}
	return s, nil
}

// LoadGateway reads the configuration of a gateway. The error is [Faults].
func LoadGateway(file string, o Options) (*Gateway, error) {
	d, root, err := open(file, o)
	if err != nil {
		return nil, err
	}
	g := d.gateway(root)
	if err := d.result(); err != nil {
		return nil, err
	}
	return g, nil
}

// KindOf tells what a file is for: one with a server block is a sidecar's. The
// error is [Faults], for a file that cannot be read or parsed.
func KindOf(file string) (Kind, error) {
	_, root, err := open(file, Options{})
	if err != nil {
		return "", err
	}
	for _, b := range root.body.Blocks {
		if b.Type == "server" {
			return KindSidecar, nil
		}
	}
	return KindGateway, nil
}
