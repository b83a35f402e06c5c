#!/bin/bash
# The first process of a guest: the root is this machine's, read-only. Mounts the server's NFS and runs one job.
# The kernel's command line says: guest_address= guest_name= nfs= signals= (a folder shared with this machine) job=
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /mnt
for word in $(cat /proc/cmdline); do case $word in guest_*=* | nfs=* | signals=* | job=*) declare "$word" ;; esac done
hostname "$guest_name"
echo "127.0.0.1 localhost $guest_name" > /run/hosts
mount --bind /run/hosts /etc/hosts
mkdir -p /run/modules/lib/modules /mnt/shared /mnt/signals
ln -s "/usr/lib/uml/modules/$(uname -r)" /run/modules/lib/modules/
printf '#!/bin/sh\nexec /sbin/modprobe -d /run/modules "$@"\n' > /run/modprobe
chmod 755 /run/modprobe
echo /run/modprobe > /proc/sys/kernel/modprobe
ip link set lo up
ip link set vec0 up
ip addr add "$guest_address/24" dev vec0
mount -t hostfs none /mnt/signals -o "$signals"
for _ in 1 2 3 4 5; do mount -t nfs4 -o vers=4.1 "$nfs" /mnt/shared && break; sleep 1; done
bash "/mnt/signals/$job" 2>&1
echo "ended with $?"
sleep 1000
