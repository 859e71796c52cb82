import java.net.InetAddress;

/** Prints the addresses of a name. */
class Lookup {
    public static void main(String[] names) throws Exception {
        for (InetAddress address : InetAddress.getAllByName(names[0])) {
            System.out.println(address.getHostAddress());
        }
    }
}
